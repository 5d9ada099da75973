//! The footprint model on the shapes of Llama's kin.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use domain::footprint::ModelShape;

/// `own`: a tied head, biases, norms of heads.
fn shape(
    vocab_size: u64,
    [hidden_size, intermediate_size, num_hidden_layers]: [u64; 3],
    heads: [u64; 3],
    own: [bool; 3],
) -> ModelShape {
    ModelShape {
        vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads: heads[0],
        num_key_value_heads: heads[1],
        head_dim: heads[2],
        tie_word_embeddings: own[0],
        query_key_value_bias: own[1],
        query_key_norms: own[2],
        sliding_window: None,
        sliding_window_layers: 0,
    }
}

/// The numbers of parameters that the authors' files have: Mistral 7B v0.1, Qwen2.5 0.5B, Qwen3 0.6B.
#[test]
fn published_counts_of_llamas_kin() {
    for (shape, parameters, trainable) in [
        (shape(32_000, [4096, 14_336, 32], [32, 8, 128], [false; 3]), 7_241_732_096, 20_971_520),
        (shape(151_936, [896, 4864, 24], [14, 2, 64], [true, true, false]), 494_032_768, 4_399_104),
        (shape(151_936, [1024, 3072, 28], [16, 8, 128], [true, false, true]), 596_049_920, 5_046_272),
    ] {
        let got = shape.trainable_parameters(8, |name| name != ModelShape::HEAD);
        assert_eq!((shape.parameters(), got), (parameters, trainable));
    }
}

/// What was kept before a family had its own reads as a Llama's.
#[test]
fn a_shape_of_before_is_a_llamas() {
    let llama = shape(32_000, [4096, 11_008, 32], [32, 32, 128], [false; 3]);
    let mut value = serde_json::to_value(llama).unwrap();
    value
        .as_object_mut()
        .unwrap()
        .retain(|key, _| !key.starts_with("query_key") && !key.starts_with("sliding"));
    assert_eq!(serde_json::from_value::<ModelShape>(value).unwrap(), llama);
}
