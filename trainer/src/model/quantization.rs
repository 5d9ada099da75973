//! `quantization_config`: how a model was quantised before its files were written.
//!
//! Keys and defaults are those of transformers' `BitsAndBytesConfig`.

use super::family::Refusal;
use domain::trial::ComputeDtype;
use serde_json::{Value, json};

/// A base that bitsandbytes quantised to NF4 before its files were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantization {
    /// Whether magnitudes are quantised too.
    pub double_quant: bool,
}

const REMEDY: &str =
    "write it anew with load_in_4bit and bnb_4bit_quant_type nf4, or use the model that it was made of";

impl Quantization {
    /// What a `config.json` says; `None` for a model that was not quantised.
    pub(super) fn of(config: &Value) -> Result<Option<Self>, Refusal> {
        let config = &config["quantization_config"];
        if config.is_null() {
            return Ok(None);
        }
        let refuse = |problem: String| Err((format!("quantization_config: {problem}"), REMEDY.into()));
        if !config.is_object() {
            return refuse(format!("is {config}"));
        }
        // Files of before transformers 4.33 do not name the method.
        let method = config["quant_method"].as_str().unwrap_or("bitsandbytes");
        if method != "bitsandbytes" {
            return refuse(format!("quant_method is {method}; bitsandbytes can be read"));
        }
        if config["load_in_8bit"] == json!(true) {
            return refuse("load_in_8bit is true; LLM.int8() cannot be read, 4 bits can".into());
        }
        if config["load_in_4bit"] != json!(true) {
            return refuse(format!("load_in_4bit is {}", config["load_in_4bit"]));
        }
        let text = |key: &str, default: &str| config[key].as_str().unwrap_or(default).to_string();
        let kind = text("bnb_4bit_quant_type", "fp4");
        if kind != "nf4" {
            return refuse(format!("bnb_4bit_quant_type is {kind}; nf4 can be read"));
        }
        let storage = text("bnb_4bit_quant_storage", "uint8");
        if storage != "uint8" {
            return refuse(format!("bnb_4bit_quant_storage is {storage}; uint8 can be read"));
        }
        Ok(Some(Self { double_quant: config["bnb_4bit_use_double_quant"] == json!(true) }))
    }

    /// The object that transformers writes for it, to be computed in `compute_dtype`.
    pub fn to_json(self, compute_dtype: ComputeDtype) -> Value {
        json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": null,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(change: Value, want: Result<Option<bool>, &str>) {
        let mut config = Quantization { double_quant: true }.to_json(ComputeDtype::Bfloat16);
        for (key, value) in change.as_object().unwrap() {
            config[key] = value.clone();
        }
        let got = Quantization::of(&json!({ "quantization_config": config }));
        match (got, want) {
            (Ok(got), Ok(want)) => assert_eq!(got.map(|q| q.double_quant), want, "{change}"),
            (Err((problem, remedy)), Err(want)) => {
                assert_eq!(problem, format!("quantization_config: {want}"), "{change}");
                assert_eq!(remedy, REMEDY);
            }
            (got, want) => panic!("{change}: {got:?}, not {want:?}"),
        }
    }

    #[test]
    fn what_can_be_read_and_what_is_refused() {
        check(json!({}), Ok(Some(true)));
        check(json!({"bnb_4bit_use_double_quant": null}), Ok(Some(false)));
        check(json!({"quant_method": null, "bnb_4bit_quant_storage": null}), Ok(Some(true)));
        check(json!({"quant_method": "gptq"}), Err("quant_method is gptq; bitsandbytes can be read"));
        check(
            json!({"load_in_8bit": true, "load_in_4bit": false}),
            Err("load_in_8bit is true; LLM.int8() cannot be read, 4 bits can"),
        );
        check(json!({"load_in_4bit": null}), Err("load_in_4bit is null"));
        check(json!({"bnb_4bit_quant_type": "fp4"}), Err("bnb_4bit_quant_type is fp4; nf4 can be read"));
        check(json!({"bnb_4bit_quant_type": null}), Err("bnb_4bit_quant_type is fp4; nf4 can be read"));
        check(
            json!({"bnb_4bit_quant_storage": "bfloat16"}),
            Err("bnb_4bit_quant_storage is bfloat16; uint8 can be read"),
        );
        for plain in [json!({}), json!({"quantization_config": null})] {
            assert_eq!(Quantization::of(&plain), Ok(None));
        }
        let (problem, _) = Quantization::of(&json!({"quantization_config": "4bit"})).unwrap_err();
        assert_eq!(problem, "quantization_config: is \"4bit\"");
    }
}
