//! Constraints read from text; `constraint` has the grammar.

use super::constraint::{COMPARISON, Expression, OPERATORS, Operator, Sort};
use super::parameter::rule_of;
use super::problem::did_you_mean;
use crate::trial::PARAMETER_NAMES;

/// Why a constraint cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("column {column}: {message}")]
pub struct ConstraintError {
    /// The character at which it goes wrong, from 1.
    pub column: usize,
    /// What is wrong there.
    pub message: String,
}

/// Characters of the longest constraint: the parser calls itself once for each parenthesis.
const LONGEST: usize = 1000;

impl Expression {
    /// Reads a constraint and checks that its parts fit together.
    ///
    /// # Errors
    /// The first place at which it is no constraint.
    pub fn parse(text: &str) -> Result<Self, ConstraintError> {
        if text.len() > LONGEST {
            let message = format!("longer than {LONGEST} characters; split it at its `and`s");
            return Err(ConstraintError { column: LONGEST + 1, message });
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::parameter::Kind;
    use Operator::*;
    use proptest::prelude::*;

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
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_printed_reads_back(expression in condition()) {
            let text = expression.to_string();
            prop_assert_eq!(Expression::parse(&text), Ok(expression), "{}", text);
        }
    }
}
