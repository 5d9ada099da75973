//! `lorafleet generate`: what a model, or one with an adapter, goes on with after a prompt.

use crate::Failure;
use crate::download::Downloads;
use crate::model::{self, Loaded, of_trainer, precision};
use crate::output::{self, Format, OutputArgs};
use domain::trial::PrecisionMode;
use domain::{Clock, SystemClock};
use serde_json::{Value, json};
use std::path::PathBuf;
use trainer::adapter_file::PeftConfig;
use trainer::model::ModelConfig;
use trainer::pack::{self, Sampler, Sampling};
use trainer::tokenizer::Tokenizer;
use trainer::{data, locate};

/// Continues prompts with a model, or one with an adapter: greedily, or with drawn tokens.
///
/// The flags have the names and meanings of transformers' `generate`. Tokens are drawn (its do_sample) if --temperature is above
/// 0; otherwise each is the likeliest, whatever the model's generation_config.json says. A text ends at the model's EOS, after
/// --max-new-tokens, or where the model knows no more positions.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet generate --model ./models/my-llama --prompt 'Once upon a time'
  lorafleet generate --model ./models/my-llama --adapter ./adapter --max-new-tokens 100 \\
      --prompt '### Human: What colour is the sky?### Assistant:'
  lorafleet generate --model openlm-research/open_llama_3b --precision-mode 4bit --temperature 0.7 --top-p 0.9 --seed 1 \\
      --prompt 'The sky is' 'The sea is'
  lorafleet generate --model ./models/my-chat-llama --chat --file questions.txt -o json > answers.jsonl

The text is printed as it is made, of several prompts each below a line with its prompt. With -o json each prompt has a line of
JSON with prompt, text, tokens (how many), finish_reason (stop or length) and tokens_per_second.

Exit codes: 0 done, 1 the work failed, 2 usage or unusable input, 3 the hub cannot be reached, 130 interrupted.")]
pub(crate) struct Args {
    /// The model: a directory in Hugging Face's layout, or a name on its hub.
    #[arg(long, value_name = "DIR|ID")]
    model: String,
    /// An adapter of the model, in PEFT's format.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// What is continued; several prompts one after the other.
    #[arg(long, value_name = "TEXT", num_args = 1.., required_unless_present = "file")]
    prompt: Vec<String>,
    /// A file of prompts, one a line; of a .jsonl file each line is an object with the prompt under `prompt`.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Tokens of a text at most; 20 unless given, as in transformers.
    #[arg(long, alias = "max_new_tokens", value_name = "N", default_value_t = 20,
        value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// What logits are divided by before a token is drawn; 0 takes the likeliest instead.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f64,
    /// Draws from the fewest of the likeliest tokens alone that have this probability together: in (0, 1].
    #[arg(long, alias = "top_p", value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f64,
    /// The seed of the draws: the same model, prompts and seed give the same texts.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Each prompt is a person's message, put to the model by its chat template.
    #[arg(long)]
    chat: bool,
    /// The numbers that the base is held in: float32, bfloat16, float16 or 4bit.
    #[arg(long, alias = "precision_mode", value_name = "MODE", default_value = "float32", value_parser = precision)]
    precision_mode: PrecisionMode,
    /// The device: auto (the first GPU that can be used, else the CPU), cpu, cuda or cuda:N.
    #[arg(long, default_value = crate::device::AUTO, value_name = "DEVICE")]
    device: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs the verb.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let clock = SystemClock::new();
    // All that can be wrong is found before the model is loaded.
    let samplers = samplers(&args)?;
    let prompts = prompts(&args)?;
    args.adapter.as_deref().map(PeftConfig::load).transpose().map_err(of_trainer)?;
    let placed = crate::device::of(&args.device)?;
    let name = config::paths::absolute(&args.model);
    Downloads::default().model(&name, "--model")?;
    let dir = locate::model(&name).map_err(of_trainer)?;
    let config = ModelConfig::load(&dir).map_err(of_trainer)?;
    let tokenizer = model::tokenizer(&dir, &config)?;
    let most = config.max_position_embeddings;
    let tokens = |text: &String| tokens(&tokenizer, text, args.chat, most);
    let encoded = prompts.iter().map(tokens).collect::<Result<Vec<_>, _>>()?;
    let device = trainer::device::open(placed.id.as_str()).map_err(of_trainer)?;
    let loaded = Loaded::new(&dir, args.precision_mode, args.adapter.as_deref(), &device)?;
    let many = prompts.len() > 1;
    for (number, (prompt, ids)) in prompts.iter().zip(&encoded).enumerate() {
        let format = args.output.format;
        if format == Format::Table && many {
            let gap = if number > 0 { "\n" } else { "" };
            output::part(&format!("{gap}==> {prompt} <==\n"))?;
        }
        let sampler = samplers(number)?;
        let made = generate(&loaded, ids, args.max_new_tokens as usize, &sampler, format, &clock)?;
        match format {
            Format::Table => output::part("\n")?,
            Format::Json => output::part(&format!("{}\n", made.document(prompt)))?,
            Format::Yaml => output::part(&format!("---\n{}\n", output::yaml(&made.document(prompt))?))?,
        }
    }
    Ok(())
}

/// Who chooses the tokens of each prompt's text, by its number: what is drawn for one does not depend on the others.
fn samplers(args: &Args) -> Result<impl Fn(usize) -> Result<Sampler, Failure>, Failure> {
    let Args { temperature, top_p, seed, .. } = *args;
    let sampling = Sampling { temperature, top_p, seed };
    sampling.check().map_err(|error| Failure::invalid(format!("--{error}")))?;
    if temperature == 0.0 && top_p < 1.0 {
        return Err(Failure::invalid(format!(
            "--top-p {top_p}: nothing is drawn at temperature 0; add --temperature 1, or leave it out"
        )));
    }
    Ok(move |number| Sampler::new(sampling, &format!("generate/{number}")).map_err(of_trainer))
}

/// The prompts that were given, of which none is empty.
fn prompts(args: &Args) -> Result<Vec<String>, Failure> {
    let Some(path) = &args.file else {
        return match args.prompt.iter().any(|prompt| prompt.trim().is_empty()) {
            true => Err(Failure::invalid("--prompt: is empty; give a text to continue")),
            false => Ok(args.prompt.clone()),
        };
    };
    let wrong =
        |place: String, problem: &str| Failure::invalid(format!("{}{place}: {problem}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(String::new(), &error.to_string()))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompt = |(number, line): (usize, &str)| {
        if path.extension().is_none_or(|extension| extension != "jsonl") {
            return Ok(line.to_string());
        }
        let object: Value = serde_json::from_str(line).unwrap_or_default();
        let prompt = object["prompt"].as_str().filter(|prompt| !prompt.is_empty());
        let problem = "is no object with a text under `prompt`; write {\"prompt\": \"…\"}";
        prompt.map(str::to_string).ok_or_else(|| wrong(format!(":{}", number + 1), problem))
    };
    let prompts = lines.map(prompt).collect::<Result<Vec<_>, _>>()?;
    if prompts.is_empty() {
        return Err(wrong(String::new(), "holds no prompt; write one on each line"));
    }
    Ok(prompts)
}

/// A prompt's tokens, of which a model that knows `most` positions can read all and go on.
fn tokens(tokenizer: &Tokenizer, prompt: &str, is_chat: bool, most: usize) -> Result<Vec<u32>, Failure> {
    let ids = data::prompt(tokenizer, prompt, is_chat).map_err(of_trainer)?;
    let shown: String = prompt.chars().take(40).collect();
    if ids.is_empty() {
        return Err(Failure::invalid(format!("prompt {shown:?}: has no token; give a text to continue")));
    }
    if ids.len() >= most {
        return Err(Failure::invalid(format!(
            "prompt {shown:?}: has {} tokens, and the model reads {most} together with those that it adds; shorten it",
            ids.len()
        )));
    }
    Ok(ids)
}

/// What came after a prompt.
struct Made {
    text: String,
    tokens: usize,
    finish_reason: &'static str,
    tokens_per_second: f64,
}

impl Made {
    fn document(&self, prompt: &str) -> Value {
        json!({
            "prompt": prompt,
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "tokens_per_second": self.tokens_per_second,
        })
    }
}

/// Continues a prompt, whose text for people is printed as it is made.
fn generate(
    loaded: &Loaded,
    prompt: &[u32],
    max_new_tokens: usize,
    sampler: &Sampler,
    format: Format,
    clock: &dyn Clock,
) -> Result<Made, Failure> {
    let Loaded { base, adapter, tokenizer } = loaded;
    let continuation = Continuation::new(tokenizer, prompt).map_err(of_trainer)?;
    let (mut printed, mut refused) = (String::new(), None);
    let mut show = |text: &str| {
        // A text that begins otherwise now that there is more of it has been printed in vain.
        let Some(new) = text.strip_prefix(printed.as_str()).filter(|new| !new.is_empty()) else {
            return true;
        };
        refused = output::part(new).err();
        printed = text.to_string();
        refused.is_none()
    };
    let mut is_over = |new: &[u32]| {
        if format != Format::Table {
            return Ok(false);
        }
        // A character of several tokens is told once it is whole.
        Ok(!show(continuation.text(new)?.trim_end_matches(char::REPLACEMENT_CHARACTER)))
    };
    let started = clock.monotonic();
    let ends = tokenizer.ends();
    let ids = pack::sample_until(base, adapter.as_ref(), prompt, max_new_tokens, ends, sampler, &mut is_over)
        .map_err(of_trainer)?;
    let seconds = clock.monotonic().saturating_sub(started).as_secs_f64();
    let text = continuation.text(&ids).map_err(of_trainer)?;
    if format == Format::Table {
        show(&text);
    }
    if let Some(failure) = refused {
        return Err(failure);
    }
    let most = max_new_tokens.min(base.config.max_position_embeddings.saturating_sub(prompt.len()));
    Ok(Made {
        text,
        tokens: ids.len(),
        finish_reason: if ids.len() < most { "stop" } else { "length" },
        tokens_per_second: if seconds > 0.0 { ids.len() as f64 / seconds } else { 0.0 },
    })
}

/// The text that new tokens add to a prompt's: some tokenizers leave out a blank at a text's beginning, and a character may
/// be of several tokens.
struct Continuation<'a> {
    tokenizer: &'a Tokenizer,
    /// The end of the prompt.
    before: &'a [u32],
    /// The text of that alone.
    text_before: String,
}

impl<'a> Continuation<'a> {
    /// Tokens of the prompt that are looked at.
    const BEFORE: usize = 8;

    fn new(tokenizer: &'a Tokenizer, prompt: &'a [u32]) -> trainer::Result<Self> {
        let before = &prompt[prompt.len().saturating_sub(Self::BEFORE)..];
        Ok(Self { tokenizer, before, text_before: tokenizer.decode(before)? })
    }

    fn text(&self, new: &[u32]) -> trainer::Result<String> {
        let whole = self.tokenizer.decode(&[self.before, new].concat())?;
        match whole.strip_prefix(&self.text_before) {
            Some(text) => Ok(text.to_string()),
            None => self.tokenizer.decode(new),
        }
    }
}
