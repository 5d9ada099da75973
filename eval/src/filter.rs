//! Generated answers once they are there: what filters make of them, and whether that is right.

use crate::pattern::Pattern;
use crate::task::Task;
use serde::{Deserialize, Serialize};

/// The name of what comes of an answer that no filter of the task's goes over.
pub(crate) const NO_FILTER: &str = "none";

/// What answers go through before they are counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// Its name: stands behind the metric's.
    pub name: String,
    /// Its steps, in order.
    pub filter: Vec<Step>,
}

/// A step of a filter, under the harness's name and with its keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "function", rename_all = "snake_case", deny_unknown_fields)]
pub enum Step {
    /// What an expression of Python's finds: its groups' text if it has some, without the space around it.
    Regex {
        /// The expression.
        #[serde(default = "number_behind_hashes")]
        regex_pattern: String,
        /// Which of all places where it is found, from 0; from the last one back if negative, which is −1.
        #[serde(default)]
        group_select: i64,
        /// What stands for an answer in which it is not found.
        #[serde(default = "invalid")]
        fallback: String,
    },
    /// The first of several answers. There is but one.
    TakeFirst {},
    /// Without the space around it.
    RemoveWhitespace {},
    /// In small letters.
    Lowercase {},
    /// In capital letters.
    Uppercase {},
}

fn number_behind_hashes() -> String {
    r"#### (\-?[0-9\.\,]+)".into()
}

fn invalid() -> String {
    "[invalid]".into()
}

/// What `exact_match` disregards of an answer and of the right one, in the order of the fields.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ignored {
    /// What these expressions of Python's find.
    pub regexes_to_ignore: Vec<String>,
    /// Capitals.
    pub ignore_case: bool,
    /// ASCII's punctuation.
    pub ignore_punctuation: bool,
    /// The digits 0 to 9.
    pub ignore_numbers: bool,
}

/// What a filter makes of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Filtered {
    pub(crate) text: String,
    pub(crate) is_right: bool,
}

/// A task's filters and its comparison, with their expressions compiled.
#[derive(Debug, Clone)]
pub(crate) struct Judge {
    filters: Vec<Vec<(Step, Option<Pattern>)>>,
    regexes: Vec<Pattern>,
    ignored: Ignored,
}

impl Judge {
    /// The judge of a task's answers, filter by filter, or as they are where it has none.
    ///
    /// # Errors
    /// What is no regular expression, in words.
    pub(crate) fn new(task: &Task) -> Result<Self, String> {
        let ready = |step: &Step| {
            let regex = match step {
                Step::Regex { regex_pattern, .. } => Some(Pattern::new(regex_pattern)?),
                _ => None,
            };
            Ok((step.clone(), regex))
        };
        let filter = |filter: &Filter| filter.filter.iter().map(ready).collect::<Result<Vec<_>, String>>();
        let mut filters = task.filter_list.iter().map(filter).collect::<Result<Vec<_>, _>>()?;
        if filters.is_empty() {
            filters.push(Vec::new());
        }
        let ignored = task.metrics.first().map(|counted| counted.ignored.clone()).unwrap_or_default();
        let regexes = ignored.regexes_to_ignore.iter().map(|regex| Pattern::new(regex));
        Ok(Self { filters, regexes: regexes.collect::<Result<_, _>>()?, ignored })
    }

    /// What each filter makes of an answer, and whether it is then one of the right ones.
    ///
    /// # Errors
    /// An expression cannot be looked for in it, in words.
    pub(crate) fn of(&self, answer: &str, targets: &[String]) -> Result<Vec<Filtered>, String> {
        let targets: Vec<_> = targets.iter().map(|target| self.plain(target)).collect::<Result<_, _>>()?;
        let of = |steps: &Vec<(Step, Option<Pattern>)>| {
            let mut text = answer.to_owned();
            for (step, regex) in steps {
                text = apply(step, regex.as_ref(), text)?;
            }
            let is_right = targets.contains(&self.plain(&text)?);
            Ok(Filtered { text, is_right })
        };
        self.filters.iter().map(of).collect()
    }

    /// A text without what is disregarded.
    fn plain(&self, text: &str) -> Result<String, String> {
        let mut text = text.to_owned();
        for regex in &self.regexes {
            text = regex.replaced(&text, "")?;
        }
        let Ignored { ignore_case, ignore_punctuation, ignore_numbers, .. } = self.ignored;
        if ignore_case {
            text = text.to_lowercase();
        }
        text.retain(|c| {
            !(ignore_punctuation && c.is_ascii_punctuation() || ignore_numbers && c.is_ascii_digit())
        });
        Ok(text)
    }
}

fn apply(step: &Step, regex: Option<&Pattern>, text: String) -> Result<String, String> {
    Ok(match step {
        Step::Regex { group_select, fallback, .. } => match regex {
            Some(regex) => found(regex, *group_select, fallback, &text)?,
            None => text,
        },
        Step::TakeFirst {} => text,
        Step::RemoveWhitespace {} => text.trim().to_owned(),
        Step::Lowercase {} => text.to_lowercase(),
        Step::Uppercase {} => text.to_uppercase(),
    })
}

/// One of all that Python's `re.findall` finds.
fn found(regex: &Pattern, select: i64, fallback: &str, text: &str) -> Result<String, String> {
    let all = regex.all(text)?;
    let select = isize::try_from(select).unwrap_or(isize::MAX);
    let place = if select < 0 { all.len().checked_add_signed(select) } else { Some(select.unsigned_abs()) };
    let Some(captures) = place.and_then(|place| all.get(place)) else { return Ok(fallback.to_owned()) };
    let group = |number: usize| captures.get(number).map_or("", |found| found.as_str());
    let chosen = match captures.len() {
        // The whole, or the only group.
        groups @ ..=2 => group(groups.saturating_sub(1)),
        groups => (1..groups).map(group).find(|text| !text.is_empty()).unwrap_or(fallback),
    };
    Ok(chosen.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task;
    use serde_json::{Value, json};

    /// A task of generated answers with other keys.
    fn judge(filters: Value, metric: Value) -> Judge {
        let mut task = task::find("gsm8k").unwrap();
        task.filter_list = serde_json::from_value(filters).unwrap();
        task.metrics = vec![serde_json::from_value(metric).unwrap()];
        Judge::new(&task).unwrap()
    }

    /// What the harness's filters make of a text, by CPython 3.11's `re`. (A place that there is not is an error there.)
    #[test]
    fn filters_make_of_a_text_what_the_harnesss_do() {
        let check = |steps: Value, text: &str, want: &str| {
            let judge = judge(json!([{ "name": "f", "filter": steps }]), "exact_match".into());
            let got = judge.of(text, &[]).unwrap();
            assert_eq!(got, [Filtered { text: want.into(), is_right: false }], "{steps} of {text:?}");
        };
        let regex = |pattern: &str, select: i64| {
            let find = json!({ "function": "regex", "regex_pattern": pattern, "group_select": select });
            json!([find, { "function": "take_first" }])
        };
        let numbers = "(-?[$0-9.,]{2,})|(-?[0-9]+)";
        check(json!([{ "function": "regex" }]), "so\n#### 1,234. #### 5", "1,234.");
        check(json!([{ "function": "regex" }]), "so 5", "[invalid]");
        check(json!([{ "function": "regex", "fallback": "" }]), "so 5", "");
        check(regex(numbers, -1), "3 apples cost $4.50, so 7", "7");
        check(regex(numbers, 0), "3 apples cost $4.50, so 7", "3");
        check(regex(numbers, 1), "3 apples cost $4.50, so 7", "$4.50,");
        check(regex(numbers, -4), "3 apples cost $4.50, so 7", "[invalid]");
        check(regex("a+", 1), "a aa", "aa");
        check(regex(".*", 2), "a\nb", "b");
        check(regex(".*", -2), "a\nb", "b");
        check(regex("is( [a-z]*)", 0), "it is here", "here");
        check(regex("(a)?(b)?c", 0), "c", "[invalid]");
        check(regex("(a)?c", 0), "c", "");
        check(json!([{ "function": "remove_whitespace" }]), " \n a ", "a");
        check(json!([{ "function": "lowercase" }]), "A\u{c4}b", "a\u{e4}b");
        check(
            json!([{ "function": "uppercase" }, { "function": "regex", "regex_pattern": "B." }]),
            "abc",
            "BC",
        );
        check(json!([]), " as it is", " as it is");
    }

    /// `exact_match_hf_evaluate` of the harness, by CPython 3.11's `re` and `str`.
    #[test]
    fn what_counts_as_the_same() {
        let check = |options: Value, answer: &str, targets: &[&str], want: bool| {
            let mut metric = options.clone();
            metric["metric"] = "exact_match".into();
            let targets: Vec<_> = targets.iter().map(ToString::to_string).collect();
            let got = judge(json!([]), metric).of(answer, &targets).unwrap();
            assert_eq!(got, [Filtered { text: answer.into(), is_right: want }], "{options}: {answer:?}");
        };
        check(json!({}), "Paris", &["Paris"], true);
        check(json!({}), " Paris", &["Paris"], false);
        check(json!({}), "paris", &["Paris"], false);
        check(json!({}), "b", &["a", "b"], true);
        check(json!({}), "b", &[], false);
        check(json!({ "ignore_case": true }), "PARIS", &["Paris"], true);
        check(json!({ "ignore_punctuation": true }), "U.S.", &["US"], true);
        check(json!({ "ignore_punctuation": true }), "caf\u{e9}\u{2019}", &["caf\u{e9}"], false);
        check(json!({ "ignore_numbers": true }), "R2D2", &["RD"], true);
        check(json!({ "ignore_numbers": true }), "R\u{0662}", &["R"], false);
        let money = json!({ "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"] });
        check(money.clone(), "$1,234.", &["He has\nso #### 1234"], true);
        check(money.clone(), "1234.5", &["#### 1234"], false);
        check(money, "#### 7\n#### 8", &["8"], true);
        // Expressions see capitals, which go after them.
        check(json!({ "regexes_to_ignore": ["a"], "ignore_case": true }), "Ab", &["b"], false);
    }
}
