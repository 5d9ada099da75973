//! Data files to rows of tokens, the held-out split, and the order in which training takes the rows.
//!
//! | module | holds |
//! |---|---|
//! | `source` | which files a name means; all their rows, good and bad |
//! | `json`, `parquet` | one file's rows |
//! | `record` | which columns count and what they may hold |
//! | `chat` | conversations to text, by the model's chat template |
//! | `marked` | a text and the assistant's parts of it |
//! | `assistant` | the assistant's turns in a text of guanaco's form |
//! | `split` | which rows are held out |
//! | `mix` | several data sets' rows as one |
//! | `batches` | which rows an optimizer step takes |

mod assistant;
mod batches;
mod chat;
mod json;
mod marked;
mod mix;
mod parquet;
mod record;
mod source;
mod split;

pub use batches::step_batches;
pub use source::objects;

use crate::error::{Result, TrainError};
use crate::files;
use crate::pack::Row;
use crate::tokenizer::{ChatSettings, Encoding, Tokenizer};
use chat::Chat;
use domain::trial::TrialConfig;
use marked::Marked;
use rayon::prelude::*;
use record::{Columns, Content};
use std::iter;
use std::path::PathBuf;

/// A trial's rows.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    /// The rows to train on, in the files' order, each once.
    pub train: Vec<Row>,
    /// The numbers of the rows of `train` in the order in which a mixture of data sets has them; `None` where that is
    /// their own.
    pub mixed: Option<Vec<u32>>,
    /// The held-out rows, in the files' order.
    pub eval: Vec<Row>,
    /// Tokens of the first held-out (if none, training) text up to where its assistant first begins; texts whose
    /// prompt leaves no room for an answer are passed over.
    pub sample_prompt: Option<Vec<u32>>,
    /// The text of `sample_prompt`.
    pub sample_prompt_text: Option<String>,
    /// Rows (training and held out) that were cut to `max_sequence_length`.
    pub truncated_rows: u64,
    /// Rows that could not be read and were left out.
    pub skipped_rows: u64,
    /// `sha256:…` of the data files, of what each of them is for unless all of them are one set to train on, and of the
    /// chat template if it made texts.
    pub digest: String,
}

/// A row and, if it was made from one, its text.
type Read = (Row, Option<Marked>);

/// What a set of files is for.
const TRAIN: &str = "train";
const EVAL: &str = "eval";

/// What it takes to make rows.
struct Reader<'a> {
    config: &'a TrialConfig,
    tokenizer: Option<&'a Tokenizer>,
    vocab_size: usize,
    chat: Chat<'a>,
    dataset: Dataset,
    /// What was read, and what for.
    files: Vec<(&'static str, Vec<PathBuf>)>,
}

impl Dataset {
    /// Reads, tokenises and splits a trial's data. `tokenizer` may be missing if the rows are tokenised already;
    /// `vocab_size` is the number of the model's embedding rows, `max_position` the longest sequence that it
    /// takes.
    ///
    /// # Errors
    /// A file is missing, empty or has a row that cannot be read (unless `skip_bad_rows`); the column is missing;
    /// a token has no embedding row; rows may be longer than the model takes; nothing is left to train on.
    pub fn load(
        config: &TrialConfig,
        tokenizer: Option<&Tokenizer>,
        vocab_size: usize,
        max_position: usize,
    ) -> Result<Self> {
        check_length(config, max_position)?;
        let none = ChatSettings::default();
        let settings = tokenizer.map_or(&none, Tokenizer::chat);
        let chat = Chat::new(settings, config.assistant_only_loss);
        let dataset = Self::default();
        let mut reader = Reader { config, tokenizer, vocab_size, chat, dataset, files: Vec::new() };
        mix::probabilities(config)?;
        let others = config.interleave_datasets.iter().flatten().map(|name| ("interleave_datasets", name));
        let (mut sets, mut eval) = (Vec::new(), Vec::new());
        for (key, name) in iter::once(("dataset_name", &config.dataset_name)).chain(others) {
            let found = source::find(key, name)?;
            let rows = reader.read(TRAIN, key, found.train)?;
            let (train, held_out) = match config.eval_dataset_name {
                Some(_) => (rows, Vec::new()),
                None if !found.held_out.is_empty() && config.eval_size != 0.0 => {
                    (rows, reader.read(EVAL, key, found.held_out)?)
                }
                None => split::hold_out(config, rows)?,
            };
            sets.push(train);
            eval.extend(held_out);
        }
        if let Some(name) = &config.eval_dataset_name {
            let key = "eval_dataset_name";
            let found = source::find(key, name)?;
            let files = if found.held_out.is_empty() { found.train } else { found.held_out };
            eval = reader.read(EVAL, key, files)?;
        }
        let is_chat = |(_, text): &Read| text.as_ref().is_some_and(|text| text.whole);
        let all = || eval.iter().chain(sets.iter().flatten());
        let template = settings.template.as_ref().filter(|_| all().any(is_chat));
        reader.sample_prompt(all())?;
        let Reader { mut dataset, files: read, .. } = reader;
        let lengths: Vec<_> = sets.iter().map(Vec::len).collect();
        dataset.mixed = mix::order(config, &lengths)?;
        dataset.train = sets.into_iter().flatten().map(|(row, _)| row).collect();
        dataset.eval = eval.into_iter().map(|(row, _)| row).collect();
        dataset.digest = digest(&read)?;
        if let Some(template) = template {
            // It made the texts, as the files did.
            dataset.digest = files::digest(format!("{}\0{template}", dataset.digest).as_bytes());
        }
        if !dataset.rows().any(|row| row.targets.contains(&true)) {
            return Err(TrainError::parameter(
                "dataset_name",
                format!("no training row has a token to predict in its first {}", config.max_sequence_length),
                "set assistant_only_loss: false, a longer max_sequence_length, or labels other than -100",
            ));
        }
        Ok(dataset)
    }

    /// How many rows an epoch trains on.
    pub fn len(&self) -> usize {
        self.mixed.as_ref().map_or(self.train.len(), Vec::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row `number` of [`Dataset::len`].
    pub fn row(&self, number: usize) -> &Row {
        &self.train[self.mixed.as_ref().map_or(number, |mixed| mixed[number] as usize)]
    }

    /// Tokens of the largest micro-batch that there can be: that of the longest rows.
    pub fn batch_tokens(&self, batch_size: u32) -> u64 {
        let mut lengths: Vec<_> = self.rows().map(|row| row.input_ids.len() as u64).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.iter().take(batch_size as usize).sum()
    }

    /// The rows that an epoch trains on, as they are mixed.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        (0..self.len()).map(|number| self.row(number))
    }
}

/// One set to train on has the digest of its files; several have one that tells them and their roles apart.
fn digest(sets: &[(&str, Vec<PathBuf>)]) -> Result<String> {
    let of = |files: &[PathBuf]| files::digest_files(files.iter().map(PathBuf::as_path));
    if let [(_, files)] = sets {
        return of(files);
    }
    let mut text = String::new();
    for (role, files) in sets {
        text += &format!("{role}\0{}\0", of(files)?);
    }
    Ok(files::digest(text.as_bytes()))
}

fn check_length(config: &TrialConfig, max_position: usize) -> Result<()> {
    let length = config.max_sequence_length;
    let problem = match length as usize {
        0 | 1 => format!("{length} leaves no token to predict"),
        n if n > max_position => {
            format!("{length} is above the model's max_position_embeddings {max_position}")
        }
        _ => return Ok(()),
    };
    Err(TrainError::parameter("max_sequence_length", problem, format!("set it from 2 to {max_position}")))
}

impl Reader<'_> {
    fn read(
        &mut self,
        role: &'static str,
        key: &'static str,
        files: Vec<source::DataFile>,
    ) -> Result<Vec<Read>> {
        let text = &self.config.instruct_column_in_dataset;
        let columns = Columns { text, vocab_size: self.vocab_size, chat: &self.chat };
        let (rows, skipped) = source::read(key, &files, &columns, self.config.skip_bad_rows)?;
        self.dataset.skipped_rows += skipped;
        self.files.push((role, files.into_iter().map(|file| file.path).collect()));
        let read: Vec<Read> = rows.into_par_iter().map(|content| self.row(content)).collect::<Result<_>>()?;
        self.check_ids(&read)?;
        let length = self.config.max_sequence_length as usize;
        let cut = |(mut row, text): Read| {
            self.dataset.truncated_rows += u64::from(row.input_ids.len() > length);
            row.input_ids.truncate(length);
            row.targets.truncate(length);
            (row, text)
        };
        Ok(read.into_iter().map(cut).collect())
    }

    fn row(&self, content: Content) -> Result<Read> {
        match (content, self.tokenizer) {
            (Content::Marked(text), Some(tokenizer)) => Ok((self.encode(&text, tokenizer)?, Some(text))),
            (Content::Marked(_), None) => Err(TrainError::parameter(
                "pretrained_model_id",
                "the model has no tokenizer for the text rows of the data set",
                "put its tokenizer.json or tokenizer.model beside its weights, or give rows with input_ids",
            )),
            (Content::Tokens(_), _) if self.config.assistant_only_loss => Err(TrainError::parameter(
                "assistant_only_loss",
                "tokenised rows have no text in which to find the assistant's turns",
                "set it to false and mask the other tokens with labels of -100",
            )),
            (Content::Tokens(row), _) => Ok((row, None)),
        }
    }

    /// A text's tokens and EOS, and which of them are to be predicted.
    fn encode(&self, marked: &Marked, tokenizer: &Tokenizer) -> Result<Row> {
        let text = &marked.text;
        let Encoding { mut ids, mut starts } = encoded(tokenizer, text, marked.whole)?;
        if self.config.add_eos && !marked.whole {
            let eos = tokenizer.eos().ok_or_else(|| {
                TrainError::parameter(
                    "add_eos",
                    format!("{} names no EOS token", tokenizer.path().display()),
                    "name it as eos_token in the model's tokenizer_config.json, or set add_eos: false",
                )
            })?;
            if ids.last() != Some(&eos) {
                ids.push(eos);
                starts.push(text.chars().count());
            }
        }
        let mut row = Row::whole(ids);
        if self.config.assistant_only_loss {
            for (target, start) in row.targets.iter_mut().zip(&starts) {
                *target &= marked.parts.iter().any(|part| part.contains(start));
            }
        }
        Ok(row)
    }

    /// Each token must have its embedding row. Ids of tokenised rows were checked when they were read.
    fn check_ids(&self, rows: &[Read]) -> Result<()> {
        let highest = rows.iter().flat_map(|(row, _)| &row.input_ids).max();
        match (highest, self.tokenizer) {
            (Some(&id), Some(tokenizer)) if id as usize >= self.vocab_size => Err(TrainError::model(
                tokenizer.path(),
                format!(
                    "gives token id {id} (`{}`) for this data, more than the model's {} embedding rows hold",
                    tokenizer.piece(id).unwrap_or_default(),
                    self.vocab_size
                ),
                "use the tokenizer that belongs to the model",
            )),
            _ => Ok(()),
        }
    }

    fn sample_prompt<'a>(&mut self, rows: impl Iterator<Item = &'a Read>) -> Result<()> {
        let Some(tokenizer) = self.tokenizer else { return Ok(()) };
        let texts = rows.filter_map(|(_, text)| text.as_ref());
        for marked in texts.filter(|text| text.prompt > 0) {
            let prompt = &marked.text[..marked.prompt];
            let mut ids = encoded(tokenizer, prompt, marked.whole)?.ids;
            if tokenizer.eos().is_some() && ids.last().copied() == tokenizer.eos() {
                ids.pop();
            }
            if ids.len() < self.config.max_sequence_length as usize {
                self.dataset.sample_prompt = Some(ids);
                self.dataset.sample_prompt_text = Some(prompt.to_owned());
                break;
            }
        }
        Ok(())
    }
}

/// A prompt's tokens, as a model continues it: with what the tokenizer puts in front, without an EOS behind. `is_chat`: it is
/// a person's one message, which the model's chat template makes the prompt of.
///
/// # Errors
/// The model has no chat template, or one that refuses the message; the tokenizer fails on the text.
pub fn prompt(tokenizer: &Tokenizer, text: &str, is_chat: bool) -> Result<Vec<u32>> {
    let mut ids = if is_chat {
        let path = tokenizer.path();
        if tokenizer.chat().template.is_none() {
            let remedy = "put a chat_template.jinja beside it, or give the prompt as the model reads it";
            return Err(TrainError::model(path, "comes without a chat template", remedy));
        }
        let made = Chat::new(tokenizer.chat(), false).prompt(text);
        let text = made.map_err(|(problem, remedy)| TrainError::model(path, problem, remedy))?;
        encoded(tokenizer, &text, true)?.ids
    } else {
        encoded(tokenizer, text, false)?.ids
    };
    if tokenizer.eos().is_some() && ids.last().copied() == tokenizer.eos() {
        ids.pop();
    }
    Ok(ids)
}

/// A text's tokens; one that spells out BOS and EOS itself gets no others.
fn encoded(tokenizer: &Tokenizer, text: &str, whole: bool) -> Result<Encoding> {
    if whole { tokenizer.encode_as_it_is(text) } else { tokenizer.encode(text) }
}
