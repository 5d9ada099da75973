//! The modules of a model, and which of them a trial trains whole (`modules_to_save`).

use super::ModelShape;

/// A module that holds weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its path, such as `model.layers.0.input_layernorm`.
    pub path: String,
    /// Elements of its matrix, if it has one.
    pub matrix: u64,
    /// Elements of what has one dimension: a norm's weight, a bias.
    pub vector: u64,
}

/// The modules that a trial trains whole (`modules_to_save`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Saved {
    /// Their parameters.
    pub parameters: u64,
    /// Elements of the largest matrix among them.
    pub largest: u64,
    /// Elements of the matrices among them that rows are multiplied by: all but the embedding's.
    pub multiplied: u64,
    /// Whether the embedding is one.
    pub has_embedding: bool,
    /// Whether the output head is one.
    pub has_head: bool,
    /// Whether a linear layer of the decoder is one.
    pub has_linears: bool,
}

impl ModelShape {
    /// Every module that holds weights, by its path, in model order.
    pub fn modules(&self) -> Vec<Module> {
        let module = |path: String, matrix: u64, vector: u64| Module { path, matrix, vector };
        let table = self.vocab_size * self.hidden_size;
        let mut modules = vec![module("model.embed_tokens".into(), table, 0)];
        for layer in 0..self.num_hidden_layers {
            let path = |name: &str| format!("model.layers.{layer}.{name}");
            for (place, linear) in self.linears().into_iter().enumerate() {
                let parent = if place < 4 { "self_attn" } else { "mlp" };
                let bias = if place < 3 && self.query_key_value_bias { linear.out_features } else { 0 };
                let weight = linear.in_features * linear.out_features;
                modules.push(module(path(&format!("{parent}.{}", linear.name)), weight, bias));
            }
            if self.query_key_norms {
                modules.push(module(path("self_attn.q_norm"), 0, self.head_dim));
                modules.push(module(path("self_attn.k_norm"), 0, self.head_dim));
            }
            modules.push(module(path("input_layernorm"), 0, self.hidden_size));
            modules.push(module(path("post_attention_layernorm"), 0, self.hidden_size));
        }
        modules.push(module("model.norm".into(), 0, self.hidden_size));
        modules.push(module(Self::HEAD.into(), table, 0));
        modules
    }

    /// What `modules_to_save` of these names takes: as PEFT matches them, every module whose path ends in one.
    pub fn saved(&self, names: Option<&[String]>) -> Saved {
        let is_saved = |module: &&Module| names.is_some_and(|n| n.iter().any(|n| module.path.ends_with(n)));
        let modules = self.modules();
        let modules = modules.iter().filter(is_saved);
        modules.fold(Saved::default(), |sum, module| Saved {
            parameters: sum.parameters + module.matrix + module.vector,
            largest: sum.largest.max(module.matrix),
            multiplied: sum.multiplied
                + if module.path.ends_with("embed_tokens") { 0 } else { module.matrix },
            has_embedding: sum.has_embedding || module.path.ends_with("embed_tokens"),
            has_head: sum.has_head || module.path == Self::HEAD,
            has_linears: sum.has_linears || module.path.ends_with("_proj"),
        })
    }
}
