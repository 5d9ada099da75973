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
pub(super) const OPERATORS: &[(Operator, &str, u8)] = &[
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
pub(super) const COMPARISON: u8 = 3;
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

impl Expression {
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
    pub(super) fn sort(&self) -> Result<Sort, String> {
        Ok(match self {
            Expression::Number(_) => Sort::Number,
            Expression::Text(_) => Sort::Text,
            Expression::Flag(_) => Sort::Flag,
            Expression::Parameter(name) => match rule_of(name).map(|rule| rule.kind) {
                Some(Kind::Whole | Kind::Number) => Sort::Number,
                Some(Kind::Text) => Sort::Text,
                Some(Kind::Flag) => Sort::Flag,
                Some(Kind::Mixed) | None => return Err(format!("{name} cannot stand in a constraint")),
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
pub(super) enum Sort {
    Number,
    Text,
    Flag,
}

impl Sort {
    pub(super) fn name(self) -> &'static str {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::in_force;
    use crate::trial::TrialConfig;

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
}
