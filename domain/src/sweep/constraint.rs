//! Constraints between parameters: `lora_rank * batch_size <= 256 and precision_mode != "float16"`.
//!
//! ```text
//! or          := and ("or" and)*
//! and         := comparison ("and" comparison)*
//! comparison  := sum (("<" | "<=" | ">" | ">=" | "==" | "!=") sum)?
//! sum         := product (("+" | "-") product)*
//! product     := unary (("*" | "/") unary)*
//! unary       := "-" unary | number | "text" | 'text' | true | false | parameter | "(" or ")"
//! ```
//!
//! A parameter without a value (such as `num_train_epochs` where it is not given) makes every comparison it
//! stands in false.

use super::parameter::{Kind, rule_of};
use super::problem::did_you_mean;
use crate::trial::{PARAMETER_NAMES, TrialConfig};
use serde_json::{Map, Value, json};
use std::fmt;

/// What stands between two expressions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "each says itself")]
pub enum Operator {
    Or,
    And,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Equal,
    NotEqual,
    Add,
    Subtract,
    Multiply,
    Divide,
}

use Operator::*;

/// Each operator, how it is written and how closely it binds. Longer signs stand before their beginnings.
const OPERATORS: &[(Operator, &str, u8)] = &[
    (Or, "or", 1),
    (And, "and", 2),
    (LessOrEqual, "<=", COMPARISON),
    (GreaterOrEqual, ">=", COMPARISON),
    (Equal, "==", COMPARISON),
    (NotEqual, "!=", COMPARISON),
    (Less, "<", COMPARISON),
    (Greater, ">", COMPARISON),
    (Add, "+", 4),
    (Subtract, "-", 4),
    (Multiply, "*", 5),
    (Divide, "/", 5),
];
const COMPARISON: u8 = 3;
const UNARY: u8 = 6;

impl Operator {
    fn entry(self) -> (&'static str, u8) {
        OPERATORS.iter().find(|(o, ..)| *o == self).map_or(("", 0), |(_, sign, binding)| (*sign, *binding))
    }
}

/// A constraint, parsed.
#[derive(Debug, Clone, PartialEq)]
pub enum Expression {
    /// A number, never negative; `-1` is a negation.
    Number(f64),
    /// A text in quotes.
    Text(String),
    /// `true` or `false`.
    Flag(bool),
    /// A parameter's value.
    Parameter(String),
    /// Minus the expression.
    Negate(Box<Expression>),
    /// Two expressions and what stands between them.
    Binary(Operator, Box<Expression>, Box<Expression>),
}

/// Why a constraint cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("column {column}: {message}")]
pub struct ConstraintError {
    /// The character at which it goes wrong, from 1.
    pub column: usize,
    /// What is wrong there.
    pub message: String,
}

impl Expression {
    /// Reads a constraint and checks that its parts fit together.
    ///
    /// # Errors
    /// The first place at which it is no constraint.
    pub fn parse(text: &str) -> Result<Self, ConstraintError> {
        let mut parser = Parser { characters: text.chars().collect(), at: 0 };
        let expression = parser.expression(1)?;
        parser.skip_spaces();
        if let Some(c) = parser.characters.get(parser.at) {
            return Err(parser.error(format!("expected an operator or the end, found `{c}`")));
        }
        match expression.sort().map_err(|message| ConstraintError { column: 1, message })? {
            Sort::Flag => Ok(expression),
            other => {
                let message =
                    format!("is {}, not a condition; compare it with <, <=, >, >=, == or !=", other.name());
                Err(ConstraintError { column: 1, message })
            }
        }
    }

    /// Whether the constraint holds for the values that [`in_force`] gives.
    pub fn holds(&self, values: &Map<String, Value>) -> bool {
        self.evaluate(values) == Value::Bool(true)
    }

    /// The parameters it names, in order, each as often as it stands there.
    pub fn parameters(&self) -> Vec<&str> {
        match self {
            Expression::Parameter(name) => vec![name],
            Expression::Negate(inner) => inner.parameters(),
            Expression::Binary(_, left, right) => [left.parameters(), right.parameters()].concat(),
            Expression::Number(_) | Expression::Text(_) | Expression::Flag(_) => Vec::new(),
        }
    }

    fn evaluate(&self, values: &Map<String, Value>) -> Value {
        match self {
            Expression::Number(x) => json!(x),
            Expression::Text(text) => json!(text),
            Expression::Flag(flag) => json!(flag),
            Expression::Parameter(name) => values.get(name).cloned().unwrap_or(Value::Null),
            Expression::Negate(inner) => inner.evaluate(values).as_f64().map_or(Value::Null, |x| json!(-x)),
            Expression::Binary(operator, left, right) => {
                apply(*operator, &left.evaluate(values), &right.evaluate(values))
            }
        }
    }

    /// The sort of its value, or why it has none.
    fn sort(&self) -> Result<Sort, String> {
        Ok(match self {
            Expression::Number(_) => Sort::Number,
            Expression::Text(_) => Sort::Text,
            Expression::Flag(_) => Sort::Flag,
            Expression::Parameter(name) => match rule_of(name).map(|rule| rule.kind) {
                Some(Kind::Whole | Kind::Number) => Sort::Number,
                Some(Kind::Text) => Sort::Text,
                Some(Kind::Flag) => Sort::Flag,
                Some(Kind::Modules) | None => return Err(format!("{name} cannot stand in a constraint")),
            },
            Expression::Negate(inner) => inner.expect(Sort::Number)?,
            Expression::Binary(operator, left, right) => match operator {
                Or | And => left.expect(Sort::Flag).and(right.expect(Sort::Flag))?,
                Add | Subtract | Multiply | Divide => {
                    left.expect(Sort::Number).and(right.expect(Sort::Number))?
                }
                Less | LessOrEqual | Greater | GreaterOrEqual => {
                    left.expect(Sort::Number).and(right.expect(Sort::Number))?;
                    Sort::Flag
                }
                Equal | NotEqual => {
                    right.expect(left.sort()?)?;
                    Sort::Flag
                }
            },
        })
    }

    fn expect(&self, wanted: Sort) -> Result<Sort, String> {
        let sort = self.sort()?;
        if sort == wanted {
            return Ok(sort);
        }
        Err(format!("`{self}` is {}, where {} is needed", sort.name(), wanted.name()))
    }

    fn binding(&self) -> u8 {
        match self {
            Expression::Binary(operator, ..) => operator.entry().1,
            _ => UNARY,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Number,
    Text,
    Flag,
}

impl Sort {
    fn name(self) -> &'static str {
        match self {
            Sort::Number => "a number",
            Sort::Text => "a text",
            Sort::Flag => "true or false",
        }
    }
}

fn apply(operator: Operator, left: &Value, right: &Value) -> Value {
    let flags = || (left.as_bool() == Some(true), right.as_bool() == Some(true));
    if left.is_null() || right.is_null() {
        return match operator {
            Add | Subtract | Multiply | Divide => Value::Null,
            _ => Value::Bool(false),
        };
    }
    match (operator, left.as_f64(), right.as_f64()) {
        (Or, ..) => json!(flags().0 || flags().1),
        (And, ..) => json!(flags().0 && flags().1),
        (Add, Some(a), Some(b)) => json!(a + b),
        (Subtract, Some(a), Some(b)) => json!(a - b),
        (Multiply, Some(a), Some(b)) => json!(a * b),
        (Divide, Some(a), Some(b)) => json!(a / b),
        (Less, Some(a), Some(b)) => json!(a < b),
        (LessOrEqual, Some(a), Some(b)) => json!(a <= b),
        (Greater, Some(a), Some(b)) => json!(a > b),
        (GreaterOrEqual, Some(a), Some(b)) => json!(a >= b),
        (Equal, Some(a), Some(b)) => json!(a == b),
        (NotEqual, Some(a), Some(b)) => json!(a != b),
        (Equal, ..) => json!(left == right),
        (NotEqual, ..) => json!(left != right),
        _ => Value::Null,
    }
}

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expression::Number(x) => write!(f, "{x}"),
            Expression::Text(text) if text.contains('"') => write!(f, "'{text}'"),
            Expression::Text(text) => write!(f, "\"{text}\""),
            Expression::Flag(flag) => write!(f, "{flag}"),
            Expression::Parameter(name) => f.write_str(name),
            Expression::Negate(inner) => {
                f.write_str("-")?;
                write_bound(f, inner, UNARY)
            }
            Expression::Binary(operator, left, right) => {
                let (sign, binding) = operator.entry();
                // Operators lean to the left; a comparison has no comparison beside it.
                write_bound(f, left, if binding == COMPARISON { binding + 1 } else { binding })?;
                write!(f, " {sign} ")?;
                write_bound(f, right, binding + 1)
            }
        }
    }
}

/// Writes `inner`, in parentheses if it binds less closely than `binding`.
fn write_bound(f: &mut fmt::Formatter<'_>, inner: &Expression, binding: u8) -> fmt::Result {
    if inner.binding() < binding { write!(f, "({inner})") } else { write!(f, "{inner}") }
}

struct Parser {
    characters: Vec<char>,
    at: usize,
}

impl Parser {
    /// An expression of operators that bind at least as closely as `binding`.
    fn expression(&mut self, binding: u8) -> Result<Expression, ConstraintError> {
        let mut left = self.unary()?;
        let mut compared = false;
        while let Some((operator, sign, found)) = self.operator() {
            if found < binding {
                break;
            }
            if found == COMPARISON && compared {
                return Err(self.error("two comparisons in a row; join them with `and`".into()));
            }
            self.at += sign.len();
            let right = self.expression(found + 1)?;
            left = Expression::Binary(operator, Box::new(left), Box::new(right));
            compared = found == COMPARISON;
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Expression, ConstraintError> {
        self.skip_spaces();
        let start = self.at;
        match self.characters.get(self.at).copied() {
            Some('-') => {
                self.at += 1;
                Ok(Expression::Negate(Box::new(self.unary()?)))
            }
            Some('(') => {
                self.at += 1;
                let inner = self.expression(1)?;
                self.skip_spaces();
                if self.characters.get(self.at) != Some(&')') {
                    return Err(self.error("expected `)`".into()));
                }
                self.at += 1;
                Ok(inner)
            }
            Some(quote @ ('"' | '\'')) => {
                self.at += 1;
                let text = self.take_while(|c| c != quote);
                if self.at == self.characters.len() {
                    self.at = start;
                    return Err(self.error("the text has no closing quote".into()));
                }
                self.at += 1;
                Ok(Expression::Text(text))
            }
            Some(c) if c.is_ascii_digit() || c == '.' => self.number(),
            Some(c) if c.is_ascii_alphabetic() || c == '_' => self.word(),
            Some(c) => Err(self.error(format!("expected a parameter, a number or a text, found `{c}`"))),
            None => Err(self.error("expected a parameter, a number or a text, found the end".into())),
        }
    }

    fn number(&mut self) -> Result<Expression, ConstraintError> {
        let start = self.at;
        let mut text = self.take_while(|c| c.is_ascii_digit() || c == '.');
        if matches!(self.characters.get(self.at), Some('e' | 'E')) {
            text.push('e');
            self.at += 1;
            if let Some(sign @ ('+' | '-')) = self.characters.get(self.at) {
                text.push(*sign);
                self.at += 1;
            }
            text += &self.take_while(|c| c.is_ascii_digit());
        }
        match text.parse::<f64>() {
            Ok(x) if x.is_finite() => Ok(Expression::Number(x)),
            _ => {
                self.at = start;
                Err(self.error(format!("`{text}` is no number")))
            }
        }
    }

    fn word(&mut self) -> Result<Expression, ConstraintError> {
        let start = self.at;
        let word = self.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
        match word.as_str() {
            "true" => Ok(Expression::Flag(true)),
            "false" => Ok(Expression::Flag(false)),
            name if rule_of(name).is_some() => Ok(Expression::Parameter(word)),
            name => {
                self.at = start;
                let remedy = did_you_mean(name, PARAMETER_NAMES);
                Err(self.error(format!("{name} is no parameter (a text needs quotes); {remedy}")))
            }
        }
    }

    /// The operator that comes next, its sign and how closely it binds.
    fn operator(&mut self) -> Option<(Operator, &'static str, u8)> {
        self.skip_spaces();
        let rest = &self.characters[self.at..];
        let found = OPERATORS.iter().find(|(_, sign, _)| {
            let word = sign.starts_with(|c: char| c.is_ascii_alphabetic());
            let after = rest.get(sign.len()).copied().unwrap_or(' ');
            sign.chars().zip(rest).filter(|(a, b)| a == *b).count() == sign.len()
                && !(word && (after.is_ascii_alphanumeric() || after == '_'))
        });
        found.copied()
    }

    fn skip_spaces(&mut self) {
        self.take_while(char::is_whitespace);
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let taken: String = self.characters[self.at..].iter().take_while(|c| wanted(**c)).collect();
        self.at += taken.chars().count();
        taken
    }

    fn error(&self, message: String) -> ConstraintError {
        ConstraintError { column: self.at + 1, message }
    }
}

/// Every parameter with the value in force: `lora_alpha` is 2 × rank where it is not given, `max_steps` the
/// default where neither it nor `num_train_epochs` is.
pub fn in_force(config: &TrialConfig) -> Map<String, Value> {
    let mut config = config.clone();
    config.lora_alpha = Some(config.lora_alpha_in_force());
    if config.max_steps.is_none() && config.num_train_epochs.is_none() {
        config.max_steps = Some(TrialConfig::DEFAULT_MAX_STEPS);
    }
    match serde_json::to_value(config) {
        Ok(Value::Object(values)) => values,
        // A flat struct of strings and numbers serialises without fail.
        Ok(_) | Err(_) => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_holds() {
        let config =
            TrialConfig { lora_rank: 8, batch_size: 4, learning_rate: 1e-3, ..TrialConfig::default() };
        let values = in_force(&config);
        for (text, holds) in [
            ("lora_rank == 8", true),
            ("lora_rank < 8", false),
            ("lora_rank<=8", true),
            ("lora_rank > 7.5", true),
            ("lora_rank >= 9", false),
            ("lora_rank != 8", false),
            ("lora_alpha == 2 * lora_rank", true),
            ("lora_rank * batch_size <= 32 and learning_rate < 1e-2", true),
            ("lora_rank * (batch_size + 1) <= 32", false),
            ("1 + 2 * 3 == 7", true),
            ("(1 + 2) * 3 == 9", true),
            ("10 - 4 - 3 == 3", true),
            ("16 / 4 / 2 == 2", true),
            ("-lora_rank < - 7", true),
            ("1 == 2 and 1 == 1 or 1 == 1", true),
            ("1 == 2 and (1 == 1 or 1 == 1)", false),
            ("precision_mode == 'float32'", true),
            ("precision_mode != \"float32\"", false),
            ("shuffle == true", true),
            ("shuffle and not_a_prefix == 1", false),
            ("max_steps == 500", true),
            ("num_train_epochs < 3", false),
            ("num_train_epochs != 3", false),
            ("add_eos or shuffle", true),
        ] {
            match Expression::parse(text) {
                Ok(expression) => assert_eq!(expression.holds(&values), holds, "{text}"),
                Err(e) => assert!(text.contains("not_a_prefix"), "{text}: {e}"),
            }
        }
    }

    #[test]
    fn where_it_goes_wrong() {
        for (text, message) in [
            ("", "column 1: expected a parameter, a number or a text, found the end"),
            ("lora_rank <", "column 12: expected a parameter, a number or a text, found the end"),
            ("lora_rank < < 3", "column 13: expected a parameter, a number or a text, found `<`"),
            ("lora_rank < 3 4", "column 15: expected an operator or the end, found `4`"),
            ("(lora_rank < 3", "column 15: expected `)`"),
            (
                "lora_rnk < 3",
                "column 1: lora_rnk is no parameter (a text needs quotes); did you mean lora_rank?",
            ),
            ("1 < lora_rank < 3", "column 15: two comparisons in a row; join them with `and`"),
            ("lora_rank = 3", "column 11: expected an operator or the end, found `=`"),
            ("precision_mode == \"4bit", "column 19: the text has no closing quote"),
            ("lora_rank < 1.2.3", "column 13: `1.2.3` is no number"),
            ("lora_rank < 1e999", "column 13: `1e999` is no number"),
            (
                "lora_rank + 1",
                "column 1: is a number, not a condition; compare it with <, <=, >, >=, == or !=",
            ),
            ("lora_rank == \"8\"", "column 1: `\"8\"` is a text, where a number is needed"),
            ("precision_mode < 3", "column 1: `precision_mode` is a text, where a number is needed"),
            ("lora_rank and shuffle", "column 1: `lora_rank` is a number, where true or false is needed"),
            ("target_modules == \"all-linear\"", "column 1: target_modules cannot stand in a constraint"),
        ] {
            assert_eq!(Expression::parse(text).unwrap_err().to_string(), message, "{text}");
        }
    }

    fn parameter(kinds: &'static [Kind]) -> impl Strategy<Value = Expression> {
        let names: Vec<_> = PARAMETER_NAMES
            .iter()
            .filter(|n| rule_of(n).is_some_and(|r| kinds.contains(&r.kind)))
            .map(|n| Expression::Parameter(n.to_string()))
            .collect();
        prop::sample::select(names)
    }

    fn binary(operators: &'static [Operator], inner: BoxedStrategy<Expression>) -> BoxedStrategy<Expression> {
        (prop::sample::select(operators), inner.clone(), inner)
            .prop_map(|(o, l, r)| Expression::Binary(o, Box::new(l), Box::new(r)))
            .boxed()
    }

    fn number() -> BoxedStrategy<Expression> {
        let leaf = prop_oneof![
            (0.0..1e12f64).prop_map(Expression::Number),
            (0..1000u32).prop_map(|n| Expression::Number(f64::from(n))),
            parameter(&[Kind::Whole, Kind::Number]),
        ];
        leaf.prop_recursive(4, 16, 2, |inner| {
            prop_oneof![
                inner.clone().prop_map(|e| Expression::Negate(Box::new(e))),
                binary(&[Add, Subtract, Multiply, Divide], inner.boxed()),
            ]
        })
        .boxed()
    }

    fn condition() -> BoxedStrategy<Expression> {
        let text = prop_oneof![
            "[a-z0-9 ']{0,8}".prop_map(Expression::Text),
            "[a-z0-9 \"]{0,8}".prop_map(Expression::Text),
            parameter(&[Kind::Text]),
        ];
        let leaf = prop_oneof![
            any::<bool>().prop_map(Expression::Flag),
            parameter(&[Kind::Flag]),
            binary(&[Less, LessOrEqual, Greater, GreaterOrEqual, Equal, NotEqual], number()),
            binary(&[Equal, NotEqual], text.boxed()),
        ];
        leaf.prop_recursive(4, 16, 2, |inner| binary(&[And, Or, Equal, NotEqual], inner.boxed())).boxed()
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(expression in condition()) {
            let text = expression.to_string();
            prop_assert_eq!(Expression::parse(&text), Ok(expression), "{}", text);
        }
    }
}
