//! Conversations to text, by the chat template that comes with a model's tokenizer: Jinja, with what transformers adds
//! to it.

use super::marked::Marked;
use super::record::{Value, kind};
use crate::tokenizer::ChatSettings;
use chrono::NaiveDate;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use serde::Serialize;
use serde_json::json;
use std::fmt::Write;
use std::ops::Range;

/// What is wrong with a conversation, and what to do.
type Problem = (String, &'static str);

/// The template's name in messages.
const NAME: &str = "chat template";

/// Characters of a private plane that stand where `{% generation %}` begins and ends.
const MARKS: [char; 2] = ['\u{f5a5a}', '\u{fa5a5}'];

/// A model's chat template, ready to be used.
#[derive(Debug)]
pub struct Chat<'a> {
    settings: &'a ChatSettings,
    environment: Result<Environment<'a>, Problem>,
    /// Whether the template says itself what the assistant generates.
    marks: bool,
    /// Whether the assistant's parts are wanted.
    parts: bool,
}

impl<'a> Chat<'a> {
    /// Makes a template ready. What is wrong with it is told by the first conversation. `parts`: whether the
    /// assistant's parts are to be found.
    pub fn new(settings: &'a ChatSettings, parts: bool) -> Self {
        let template = settings.template.as_deref();
        let marks = template.is_some_and(|template| generation_tags(template).next().is_some());
        Self { settings, environment: environment(template), marks, parts }
    }

    /// A conversation's text.
    ///
    /// # Errors
    /// There is no template, a message is none, or the template refuses them.
    pub fn marked(&self, messages: Vec<Value>) -> Result<Marked, Problem> {
        let messages =
            messages.into_iter().enumerate().map(|(at, m)| message(at, m)).collect::<Result<Vec<_>, _>>()?;
        if self.marks {
            return self.by_marks(&messages);
        }
        let text = self.render(&messages, false)?;
        let (mut parts, mut prompt) = (Vec::new(), 0);
        for (at, _) in messages.iter().enumerate().filter(|(_, message)| message["role"] == "assistant") {
            let begin =
                self.render(&messages[..at], true).ok().filter(|begin| text.starts_with(begin.as_str()));
            if parts.is_empty() {
                prompt = begin.as_ref().map_or(0, String::len);
            }
            if !self.parts {
                break;
            }
            let end = self.render(&messages[..=at], false).ok().filter(|end| text.starts_with(end.as_str()));
            let (Some(begin), Some(end)) = (begin, end) else {
                return Err((
                    format!(
                        "holds a conversation of which the {NAME} does not tell where message {} lies",
                        at + 1
                    ),
                    "set assistant_only_loss: false, or mark the assistant's parts in the template with \
                     {% generation %}",
                ));
            };
            parts.push(begin.chars().count()..end.chars().count());
        }
        Ok(Marked { text, parts, prompt, whole: true })
    }

    /// The text of a template that marks what the assistant generates.
    fn by_marks(&self, messages: &[Value]) -> Result<Marked, Problem> {
        let marked = self.render(messages, false)?;
        let mut text = String::with_capacity(marked.len());
        let (mut parts, mut chars, mut prompt): (Vec<Range<usize>>, _, _) = (Vec::new(), 0, 0);
        for c in marked.chars() {
            match MARKS.iter().position(|mark| *mark == c) {
                Some(0) => {
                    if parts.is_empty() {
                        prompt = text.len();
                    }
                    parts.push(chars..chars);
                }
                Some(_) => parts.last_mut().into_iter().for_each(|part| part.end = chars),
                None => {
                    text.push(c);
                    chars += 1;
                }
            }
        }
        Ok(Marked { text, parts, prompt, whole: true })
    }

    /// The text of a person's one message, up to where the assistant begins.
    ///
    /// # Errors
    /// There is no template, or it refuses the message.
    pub fn prompt(&self, content: &str) -> Result<String, Problem> {
        let environment = self.environment.as_ref().map_err(Clone::clone)?;
        let message = json!({ "role": "user", "content": content });
        let text = self.rendered(environment, &[message], true).map_err(|error| {
            let problem = format!("has a {NAME} that refuses a message alone: {}", words(&error));
            (problem, "repair the template, or leave it out and give the prompt as the model reads it")
        })?;
        Ok(text.chars().filter(|c| !MARKS.contains(c)).collect())
    }

    fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String, Problem> {
        let environment = self.environment.as_ref().map_err(Clone::clone)?;
        self.rendered(environment, messages, add_generation_prompt).map_err(|error| {
            (format!("holds a conversation that the {NAME} refuses: {}", words(&error)), "correct the row")
        })
    }

    fn rendered(
        &self,
        environment: &Environment<'_>,
        messages: &[Value],
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let mut context = self.settings.special_tokens.clone();
        context.insert("messages".into(), json!(messages));
        context.insert("add_generation_prompt".into(), json!(add_generation_prompt));
        // transformers passes these too; templates ask whether they are none.
        context.insert("tools".into(), Value::Null);
        context.insert("documents".into(), Value::Null);
        environment.get_template(NAME)?.render(Serde(context))
    }
}

/// A message with the names that templates use: `role` and `content`.
fn message(at: usize, message: Value) -> Result<Value, Problem> {
    let wrong = |what: String| (format!("has message {} that {what}", at + 1), "correct the row");
    let Value::Object(mut message) = message else {
        return Err(wrong(format!("is no object but {}", kind(&message))));
    };
    // ShareGPT's names.
    for (theirs, ours) in [("from", "role"), ("value", "content")] {
        if !message.contains_key(ours)
            && let Some(value) = message.shift_remove(theirs)
        {
            message.insert(ours.into(), value);
        }
    }
    let role = match message.get("role") {
        Some(Value::String(role)) => match role.as_str() {
            "human" => "user",
            "gpt" | "model" | "bot" => "assistant",
            other => other,
        },
        Some(other) => return Err(wrong(format!("has {} as its role", kind(other)))),
        None => return Err(wrong("has no role (`role` or `from`)".into())),
    };
    let role = json!(role);
    match message.get("content") {
        Some(Value::String(_)) => {}
        // An assistant that calls a tool may say nothing.
        Some(Value::Null) | None if message.get("tool_calls").is_some_and(|calls| !calls.is_null()) => {}
        Some(other) => return Err(wrong(format!("has {} as its content, not text", kind(other)))),
        None => return Err(wrong("has no content (`content` or `value`)".into())),
    }
    message.insert("role".into(), role);
    Ok(Value::Object(message))
}

/// Jinja as transformers sets it up.
fn environment<'a>(template: Option<&'a str>) -> Result<Environment<'a>, Problem> {
    let Some(template) = template else {
        return Err((
            "holds a conversation, and the model has no chat template".into(),
            "put a chat_template.jinja beside its tokenizer, train a chat model, or write the rows as text",
        ));
    };
    let mut environment = Environment::new();
    let broken = |error: &Error| {
        (format!("cannot be used: the {NAME} is broken: {}", words(error)), "repair the template")
    };
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| broken(&error))?);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |text: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text))
    });
    environment.add_function("strftime_now", strftime);
    let added = environment.add_template_owned(NAME, marked_template(template));
    added.map_err(|error| broken(&error))?;
    Ok(environment)
}

/// An error without the template's text around it.
fn words(error: &Error) -> String {
    let line = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    match error.detail() {
        Some(detail) => format!("{detail}{line}"),
        None => format!("{}{line}", error.kind()),
    }
}

/// `value | tojson`, written as Python's `json.dumps(value, ensure_ascii=False)` writes it.
fn to_json(value: &minijinja::Value, options: minijinja::value::Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Other options of Python's function change nothing that templates rely on.
    for name in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<minijinja::Value> = options.get(name)?;
    }
    options.assert_all_used()?;
    if value.kind() == ValueKind::Undefined {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson of what is not there"));
    }
    let mut bytes = Vec::new();
    let written = match indent {
        Some(indent) => {
            let indent = vec![b' '; indent.min(16)];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&indent);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Spaced)),
    };
    let text = written.ok().and_then(|()| String::from_utf8(bytes).ok());
    text.ok_or_else(|| Error::new(ErrorKind::BadSerialization, "tojson of what is no JSON"))
}

/// JSON on one line with a blank behind `,` and `:`.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// `strftime_now(format)`. Rows must be the same on every day and machine, so that a run can go on tomorrow: it is
/// always the day that Llama's own templates name where they are told none.
fn strftime(format: &str) -> Result<String, Error> {
    let day =
        NaiveDate::from_ymd_opt(2024, 7, 26).and_then(|day| day.and_hms_opt(0, 0, 0)).unwrap_or_default();
    let mut text = String::new();
    match write!(text, "{}", day.format(format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(Error::new(ErrorKind::InvalidOperation, format!("{format:?} is no format of a date"))),
    }
}

/// The tags `{% generation %}` and `{% endgeneration %}` of a template: where they stand, and which one it is.
fn generation_tags(template: &str) -> impl Iterator<Item = (Range<usize>, usize)> {
    template.match_indices("{%").filter_map(|(start, _)| {
        let length = template[start..].find("%}")? + 2;
        let inner = template[start + 2..start + length - 2].trim_matches(['-', '+']).trim();
        let which = ["generation", "endgeneration"].iter().position(|tag| *tag == inner)?;
        Some((start..start + length, which))
    })
}

/// The template with each generation tag as an expression that writes its mark.
fn marked_template(template: &str) -> String {
    let (mut marked, mut done) = (String::with_capacity(template.len()), 0);
    for (tag, which) in generation_tags(template) {
        let text = &template[tag.clone()];
        let (left, right) = (text.starts_with("{%-"), text.ends_with("-%}"));
        marked += &template[done..tag.start];
        marked += if left { "{{-" } else { "{{" };
        marked += &format!(" \"{}\" ", MARKS[which]);
        marked += if right { "-}}" } else { "}}" };
        done = tag.end;
        // A block's line break goes with it, an expression's would stay.
        if !right && template[done..].starts_with('\n') {
            done += 1;
        }
    }
    marked + &template[done..]
}

#[cfg(test)]
mod tests;
