//! The expressions and templates of task files: Jinja as the harness uses it.

use crate::pattern::Pattern;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use serde_json::Map;

/// Operations of one template: a sweep's author is not to keep a machine busy for ever.
const FUEL: u64 = 1_000_000;

/// Evaluates expressions and templates over a document's fields.
#[derive(Debug)]
pub(crate) struct Templates(Environment<'static>);

impl Templates {
    pub(crate) fn new() -> Self {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        environment.set_syntax(syntax.unwrap_or_default());
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(method);
        environment.add_filter("regex_replace", regex_replace);
        Self(environment)
    }

    /// A template's text.
    pub(crate) fn text(&self, template: &str, fields: &Value) -> Result<String, String> {
        self.0.render_str(template, fields.clone()).map_err(|error| words(&error))
    }

    /// An expression's value.
    pub(crate) fn value(&self, expression: &str, fields: &Value) -> Result<serde_json::Value, String> {
        let value = self.0.compile_expression(expression).and_then(|e| e.eval(fields.clone()));
        let value = value.map_err(|error| words(&error))?;
        if value.kind() == ValueKind::Undefined {
            return Err(format!("`{expression}` is not there"));
        }
        serde_json::to_value(value).map_err(|error| error.to_string())
    }

    /// The value of `{{ expression }}`; of other templates, their text.
    pub(crate) fn value_or_text(&self, template: &str, fields: &Value) -> Result<serde_json::Value, String> {
        let whole = template.trim().strip_prefix("{{").and_then(|rest| rest.strip_suffix("}}"));
        match whole.filter(|inner| !inner.contains("}}")) {
            Some(expression) => self.value(expression, fields),
            None => self.text(template, fields).map(Into::into),
        }
    }
}

/// Fields for templates.
pub(crate) fn fields(object: &Map<String, serde_json::Value>) -> Value {
    Value::from(Serde(object))
}

fn words(error: &Error) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()))
}

/// Python's methods of strings, maps and lists.
fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    if let ("index", ValueKind::Seq, [wanted]) = (name, value.kind(), arguments) {
        let place = value.try_iter()?.position(|item| item == *wanted);
        return place.map(Value::from).ok_or_else(|| {
            Error::new(ErrorKind::InvalidOperation, format!("{wanted} is not among {value}"))
        });
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

/// `text | regex_replace(pattern, replacement)`, Python's `re.sub`.
fn regex_replace(text: &str, pattern: &str, replacement: &str) -> Result<String, Error> {
    let replaced = Pattern::new(pattern).and_then(|pattern| pattern.replaced(text, replacement));
    replaced.map_err(|problem| Error::new(ErrorKind::InvalidOperation, problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever writes a task neither stops nor breaks the program that runs it.
    #[test]
    fn templates_come_to_an_end() {
        let templates = Templates::new();
        let none = fields(&Map::new());
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}";
        assert!(templates.text(endless, &none).unwrap_err().contains("fuel"));
        let backtracks = format!("{{{{ '{}' | regex_replace('(a+)+(?=b)\\\\1c', '') }}}}", "a".repeat(40));
        let error = templates.text(&backtracks, &none).unwrap_err();
        assert!(error.contains("cannot be looked for"), "{error}");
        assert_eq!(
            templates.text("{{ 'a [b] c' | regex_replace('\\\\[.*?\\\\]', '') }}", &none).unwrap(),
            "a  c"
        );
    }
}
