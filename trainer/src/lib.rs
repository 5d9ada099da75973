//! The LoRA training engine on candle.
