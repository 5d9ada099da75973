//! The base's tokenizer: byte-level BPE, trained on the stories alone, so that every token was seen while the
//! base was pretrained.

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Result, Tokenizer, TokenizerBuilder, TokenizerImpl};

pub const VOCAB: usize = 512;
pub const BOS: u32 = 1;
pub const EOS: u32 = 2;
const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];

/// Trains the tokenizer; it puts BOS in front of a text and nothing behind it, as Llama's does.
pub fn train(texts: impl Iterator<Item = String> + Send) -> Result<Tokenizer> {
    let byte_level = || ByteLevel::new(false, true, true);
    let mut tokenizer: TokenizerImpl<BPE, _, ByteLevel, TemplateProcessing, _> = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::normalizers::NFC>)
        .with_pre_tokenizer(Some(byte_level()))
        .with_decoder(Some(byte_level()))
        .with_post_processor(None)
        .build()?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(VOCAB)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(SPECIAL.map(|text| AddedToken::from(text, true)).into())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut trainer, texts)?;
    let template =
        TemplateProcessing::builder().try_single("<s> $A")?.special_tokens(vec![("<s>", BOS)]).build()?;
    tokenizer.with_post_processor(Some(template));
    Ok(tokenizer.into())
}
