//! A document to what a model is asked: a context of description, examples and question, and the choices.

use crate::data::{Data, Fields};
use crate::metric::Gold;
use crate::python_random::PythonRandom;
use crate::task::{OutputType, Sampler, Task};
use crate::template::{self, Templates};
use crate::{EvalError, Result};
use domain::sweep::FewshotOrder;
use serde_json::Value;
use std::collections::HashMap;

/// The seed of the examples' stream.
pub fn fewshot_seed(order: FewshotOrder) -> u32 {
    match order {
        FewshotOrder::V0_4 => 1234,
        FewshotOrder::V0_3 => 42,
    }
}

/// A question with its choices.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// What stands before each choice.
    pub context: String,
    /// The choices, without what stands between; of an answer that is generated, those that are right.
    pub choices: Vec<String>,
    /// What is right.
    pub gold: Gold,
}

impl Item {
    /// How long its texts are.
    pub fn bytes(&self) -> usize {
        self.context.len() + self.choices.iter().map(String::len).sum::<usize>()
    }

    /// It and its number as bytes that no other has: each part with its length in front.
    pub fn told(&self, number: usize) -> Vec<u8> {
        let gold = match &self.gold {
            Gold::Choice(place) => format!("choice {place}"),
            Gold::Labels(labels) => labels.iter().map(|label| if *label { '1' } else { '0' }).collect(),
        };
        let number = number.to_string();
        let parts = [number.as_str(), gold.as_str(), self.context.as_str()];
        let mut bytes = Vec::with_capacity(self.bytes() + 64);
        for part in parts.into_iter().chain(self.choices.iter().map(String::as_str)) {
            bytes.extend((part.len() as u64).to_le_bytes());
            bytes.extend(part.as_bytes());
        }
        bytes
    }
}

/// Makes the prompts of a task, document after document: each draws its examples where the one before left off.
#[derive(Debug)]
pub struct Prompts<'a> {
    task: &'a Task,
    data: &'a Data,
    examples: usize,
    templates: Templates,
    random: PythonRandom,
    fewshot_order: FewshotOrder,
    asked: Vec<usize>,
    /// Examples' texts by their places.
    written: HashMap<usize, String>,
}

impl<'a> Prompts<'a> {
    /// The prompts of a task with `examples` examples each, drawn and asked in an order.
    ///
    /// # Errors
    /// There are not as many examples.
    pub fn new(task: &'a Task, data: &'a Data, examples: usize, order: FewshotOrder) -> Result<Self> {
        let needed = examples + usize::from(examples > 0 && data.examples_hold_documents);
        if data.examples.len() < needed {
            let problem = format!(
                "needs {needed} documents for {examples} examples; there are {}",
                data.examples.len()
            );
            return Err(EvalError::task(&task.task, problem, "ask for fewer, or name a file with more"));
        }
        let mut random = PythonRandom::new(fewshot_seed(order));
        let mut asked: Vec<_> = (0..data.documents.len()).collect();
        if order == FewshotOrder::V0_3 {
            random.shuffle(&mut asked);
        }
        Ok(Self {
            task,
            data,
            examples,
            templates: Templates::new(),
            random,
            fewshot_order: order,
            asked,
            written: HashMap::new(),
        })
    }

    /// The documents' numbers, in the order in which they are asked.
    pub fn asked(&self) -> &[usize] {
        &self.asked
    }

    /// The prompt of the next document, number `index`.
    ///
    /// # Errors
    /// The document lacks what the task asks of it.
    pub fn item(&mut self, index: usize) -> Result<Item> {
        let document = &self.data.documents[index];
        let wrong = |place: String, problem| self.wrong(place, problem);
        let (item, description) = self.question(document).map_err(|p| wrong(here(index), p))?;
        let mut context = description;
        for example in self.chosen(document) {
            if !self.written.contains_key(&example) {
                let text = self.example(&self.data.examples[example]);
                let text = text.map_err(|p| self.wrong(format!("example {}", example + 1), p))?;
                self.written.insert(example, text);
            }
            context += self.written.get(&example).map_or("", String::as_str);
        }
        Ok(Item { context: context + &item.context, ..item })
    }

    /// The text of a document of a task of whole texts, number `index`.
    ///
    /// # Errors
    /// The document lacks what the task asks of it.
    pub fn text(&self, index: usize) -> Result<String> {
        let fields = self.fields(&self.data.documents[index]);
        let value = fields.and_then(|(_, fields)| match &self.task.doc_to_target {
            Value::String(template) => self.templates.text(template, &fields),
            other => Ok(other.to_string()),
        });
        value.map_err(|problem| self.wrong(here(index), problem))
    }

    fn wrong(&self, place: String, problem: String) -> EvalError {
        let remedy = format!("give {} documents in its data set's layout", self.task.task);
        EvalError::Document { path: self.data.path.clone(), place, problem, remedy }
    }

    /// The places of the examples before a document.
    fn chosen(&mut self, document: &Fields) -> Vec<usize> {
        let (pool, wanted) = (&self.data.examples, self.examples);
        let other = |at: &usize| !self.data.examples_hold_documents || pool[*at] != *document;
        if wanted == 0 {
            return Vec::new();
        }
        match self.task.fewshot_config.sampler {
            Sampler::FirstN => (0..pool.len()).filter(other).take(wanted).collect(),
            // One more is drawn than needed, for the case that the document is among them.
            Sampler::Default => {
                let drawn = wanted + usize::from(self.data.examples_hold_documents);
                let drawn = self.random.sample(pool.len(), drawn);
                let chosen: Vec<_> = drawn.into_iter().filter(other).take(wanted).collect();
                // v0.3 does with fewer where the document was there more than once; v0.4 draws again.
                if chosen.len() == wanted || self.fewshot_order == FewshotOrder::V0_3 {
                    return chosen;
                }
                let others: Vec<_> = (0..pool.len()).filter(other).collect();
                self.random.sample(others.len(), wanted).into_iter().map(|at| others[at]).collect()
            }
        }
    }

    /// A document's fields with those that the task makes of them.
    fn fields(&self, document: &Fields) -> std::result::Result<(Fields, minijinja::Value), String> {
        let own = template::fields(document);
        if self.task.document.is_empty() {
            return Ok((document.clone(), own));
        }
        let mut made = document.clone();
        for (name, expression) in &self.task.document {
            let value = self.templates.value(expression, &own);
            made.insert(name.clone(), value.map_err(|problem| format!("{name}: {problem}"))?);
        }
        let all = template::fields(&made);
        Ok((made, all))
    }

    /// A document's question, without examples, and the description before them.
    fn question(&self, document: &Fields) -> std::result::Result<(Item, String), String> {
        let (made, fields) = self.fields(document)?;
        let task = self.task;
        let context = self.templates.text(&task.doc_to_text, &fields)?;
        let description = self.templates.text(&task.description, &fields)?;
        if task.output_type == OutputType::GenerateUntil && task.doc_to_choice.is_null() {
            let choices = self.targets(&made, &fields)?;
            return Ok((Item { context, choices, gold: Gold::Choice(0) }, description));
        }
        let choices: Vec<String> = match &task.doc_to_choice {
            Value::String(name) if made.contains_key(name) => made[name].clone(),
            Value::String(expression) => self.templates.value_or_text(expression, &fields)?,
            list => list.clone(),
        }
        .as_array()
        .and_then(|list| list.iter().map(|choice| choice.as_str().map(str::to_owned)).collect())
        .filter(|choices: &Vec<String>| !choices.is_empty())
        .ok_or("its choices are no list of texts")?;
        let gold = match &task.doc_to_labels {
            Some(expression) => {
                Gold::Labels(labels(&self.templates.value_or_text(expression, &fields)?, &choices)?)
            }
            None => {
                let target = match &task.doc_to_target {
                    Value::String(name) if made.contains_key(name) => made[name].clone(),
                    Value::String(template) => self.templates.value_or_text(template, &fields)?,
                    other => other.clone(),
                };
                Gold::Choice(right(&target, &choices)?)
            }
        };
        // Of generated answers the right choice's own text counts.
        if let (OutputType::GenerateUntil, Gold::Choice(right)) = (task.output_type, &gold) {
            let choices = choices.into_iter().skip(*right).take(1).collect();
            return Ok((Item { context, choices, gold: Gold::Choice(0) }, description));
        }
        Ok((Item { context, choices, gold }, description))
    }

    /// The right answers of a document: one, or each of a list.
    fn targets(&self, made: &Fields, fields: &minijinja::Value) -> std::result::Result<Vec<String>, String> {
        let of = |target: &Value| match target {
            Value::String(name) if made.contains_key(name) => Ok(made[name].clone()),
            Value::String(template) => self.templates.value_or_text(template, fields),
            other => Ok(other.clone()),
        };
        let targets = match &self.task.doc_to_target {
            Value::Array(list) => list.iter().map(of).collect::<std::result::Result<Vec<_>, _>>()?,
            Value::String(name) if made.contains_key(name) => listed(made[name].clone()),
            template => listed(self.literal(of(template)?)),
        };
        let text = |target: Value| match target {
            Value::String(text) => Ok(text),
            Value::Number(_) => Ok(target.to_string()),
            // As Python writes them.
            Value::Bool(true) => Ok("True".to_owned()),
            Value::Bool(false) => Ok("False".to_owned()),
            other => Err(format!("its target {other} is neither a text nor a list of texts")),
        };
        let targets: Vec<_> = targets.into_iter().map(text).collect::<std::result::Result<_, _>>()?;
        if targets.is_empty() { Err("its target is an empty list".into()) } else { Ok(targets) }
    }

    /// The list of texts and numbers that a template's text is, as Python writes one; any other text as it is.
    fn literal(&self, target: Value) -> Value {
        let is_plain = |item: &Value| item.is_string() || item.is_number() || item.is_boolean();
        let list = target.as_str().filter(|text| text.starts_with('[') && text.ends_with(']'));
        let list = list.and_then(|text| self.templates.value(text, &template::fields(&Fields::new())).ok());
        list.filter(|list| list.as_array().is_some_and(|list| list.iter().all(is_plain))).unwrap_or(target)
    }

    /// An example's text: question and right answer.
    fn example(&self, document: &Fields) -> std::result::Result<String, String> {
        let (item, _) = self.question(document)?;
        let answer = match &item.gold {
            Gold::Choice(right) => &item.choices[*right],
            Gold::Labels(labels) => {
                let first = labels.iter().position(|label| *label).unwrap_or_default();
                &item.choices[first]
            }
        };
        let Task { target_delimiter, fewshot_delimiter, .. } = self.task;
        Ok(format!("{}{target_delimiter}{answer}{fewshot_delimiter}", item.context))
    }
}

/// What is a list, or the only one of one.
fn listed(target: Value) -> Vec<Value> {
    match target {
        Value::Array(list) => list,
        one => vec![one],
    }
}

fn here(index: usize) -> String {
    format!("document {}", index + 1)
}

/// The place of the right choice, which a target gives as a number or by the choice's own text.
fn right(target: &Value, choices: &[String]) -> std::result::Result<usize, String> {
    let place = match target {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => {
            text.parse().ok().or_else(|| choices.iter().position(|c| c == text).map(|place| place as u64))
        }
        _ => None,
    };
    let place = place.and_then(|place| usize::try_from(place).ok()).filter(|place| *place < choices.len());
    place.ok_or_else(|| format!("its target {target} is none of its {} choices", choices.len()))
}

fn labels(value: &Value, choices: &[String]) -> std::result::Result<Vec<bool>, String> {
    let labels = value.as_array().filter(|labels| labels.len() == choices.len());
    let labels = labels.map(|labels| labels.iter().map(|l| l.as_u64() == Some(1)).collect::<Vec<_>>());
    labels.filter(|labels| labels.contains(&true)).ok_or_else(|| {
        format!("its labels {value} are not one for each of {} choices, or none is 1", choices.len())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_two_items_are_told_alike() {
        let labels = |labels: &[bool]| Gold::Labels(labels.to_vec());
        let items = [
            (0, "a", &["b", "c"][..], Gold::Choice(0)),
            (1, "a", &["b", "c"], Gold::Choice(0)),
            (0, "ab", &["c"], Gold::Choice(0)),
            (0, "a", &["bc"], Gold::Choice(0)),
            (0, "a", &["b", "c"], Gold::Choice(1)),
            (0, "a", &["b", "c"], labels(&[true, false])),
            (0, "a", &["b", "c"], labels(&[false, true])),
        ];
        let told = items.each_ref().map(|(number, context, choices, gold)| {
            let choices = choices.iter().map(|choice| choice.to_string()).collect();
            Item { context: context.to_string(), choices, gold: gold.clone() }.told(*number)
        });
        assert_eq!(told.iter().collect::<BTreeSet<_>>().len(), items.len());
    }
}
