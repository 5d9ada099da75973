//! Templates of the kinds that models come with, and what is refused.

use super::*;

fn settings(template: &str) -> ChatSettings {
    let Value::Object(special_tokens) = json!({ "bos_token": "<s>", "eos_token": "</s>" }) else {
        unreachable!()
    };
    ChatSettings { template: Some(template.into()), special_tokens }
}

fn marked(template: &str, parts: bool, messages: Value) -> Result<Marked, Problem> {
    let settings = settings(template);
    let Value::Array(messages) = messages else { panic!("a list") };
    Chat::new(&settings, parts).marked(messages)
}

const CHATML: &str = "{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
";

/// As Llama 2 has it: the system's words in the first user's, a check of the order, Python's methods.
const LLAMA2: &str = "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}";

/// One that says itself what is generated.
const MARKED: &str = "{% for message in messages %}
{% if message.role == 'assistant' %}
A:{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}
U:{{ message.content }}
{% endif %}
{% endfor %}";

fn user_and_assistant() -> Value {
    json!([
        { "role": "user", "content": " é? " }, { "role": "assistant", "content": "b" },
        { "from": "human", "value": "c?" }, { "from": "gpt", "value": "d" },
    ])
}

#[test]
fn templates_and_the_assistants_parts() {
    let with_system = json!([
        { "role": "system", "content": "s" }, { "role": "user", "content": "a" }, { "role": "assistant", "content": "b" },
    ]);
    // (template, messages, text with the assistant's parts in « », bytes of the prompt)
    for (name, template, messages, want) in [
        (
            "ChatML",
            CHATML,
            user_and_assistant(),
            "<|im_start|>user\n é? <|im_end|>\n<|im_start|>assistant\n«b<|im_end|>\n»<|im_start|>user\nc?<|im_end|>\n\
             <|im_start|>assistant\n«d<|im_end|>\n»",
        ),
        (
            "Llama 2",
            LLAMA2,
            user_and_assistant(),
            "<s>[INST] é? [/INST]« b </s>»<s>[INST] c? [/INST]« d </s>»",
        ),
        ("system", LLAMA2, with_system, "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST]« b </s>»"),
        ("marked", MARKED, user_and_assistant(), "U: é? \nA:«b</s>»U:c?\nA:«d</s>»"),
        ("nobody", CHATML, json!([{ "role": "user", "content": "a" }]), "<|im_start|>user\na<|im_end|>\n"),
    ] {
        let got = marked(template, true, messages.clone()).unwrap();
        let mut shown: Vec<String> = got.text.chars().map(String::from).collect();
        for part in &got.parts {
            shown[part.start].insert(0, '«');
            shown[part.end - 1].push('»');
        }
        assert_eq!(shown.concat(), want, "{name}");
        let prompt = want.split_once('«').map_or("", |(prompt, _)| prompt);
        assert_eq!(&got.text[..got.prompt], prompt, "{name}");
        assert!(got.whole);
        let without = marked(template, false, messages).unwrap();
        assert_eq!((&without.text, without.prompt), (&got.text, got.prompt), "{name}");
    }
}

#[test]
fn what_transformers_adds_to_jinja() {
    let ask =
        json!([{ "role": "user", "content": "a<b>é", "n": [1, 2.5, null], "o": { "z": true, "a": "q" } }]);
    for (template, want) in [
        ("{{ messages[0].content | tojson }}", "\"a<b>é\""),
        ("{{ messages[0].n | tojson }}", "[1, 2.5, null]"),
        ("{{ messages[0].o | tojson }}", "{\"z\": true, \"a\": \"q\"}"),
        ("{{ messages[0].o | tojson(indent=2) }}", "{\n  \"z\": true,\n  \"a\": \"q\"\n}"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ 'a b'.split(' ')[1].upper() }}{{ messages[0].content.startswith('a') }}", "BTrue"),
        ("{{ true }} {{ none }} {{ 1.0 }}", "True None 1.0"),
        ("{% if tools is none and not date_string is defined %}x{% endif %}", "x"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "1",
        ),
        ("{{ bos_token }}{{ pad_token }}{% if add_generation_prompt %}!{% endif %}", "<s>"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('y') }}", "<y>"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
    ] {
        assert_eq!(marked(template, false, ask.clone()).unwrap().text, want, "{template}");
    }
}

#[test]
fn what_is_no_conversation_is_named() {
    let one = |message: Value| json!([message]);
    let check = |template: Option<&str>, messages: Value, want: &str| {
        let settings = template.map_or_else(ChatSettings::default, settings);
        let Value::Array(messages) = messages else { panic!("a list") };
        let (problem, remedy) = Chat::new(&settings, true).marked(messages).unwrap_err();
        let message = format!("column `messages` {problem}; {remedy}");
        assert!(message.contains(want), "{message}\nlacks {want}");
    };
    let chatml = Some(CHATML);
    check(None, user_and_assistant(), "the model has no chat template; put a chat_template.jinja beside");
    check(Some("{% if %}"), user_and_assistant(), "the chat template is broken: ");
    check(
        Some("{{ raise_exception('no ' + messages[0].role) }}"),
        user_and_assistant(),
        "refuses: no user (line 1",
    );
    check(Some(LLAMA2), one(json!({ "role": "assistant", "content": "b" })), "roles must alternate");
    check(chatml, json!(["a"]), "has message 1 that is no object but text");
    check(chatml, one(json!({ "content": "a" })), "has message 1 that has no role (`role` or `from`)");
    check(chatml, one(json!({ "role": 1, "content": "a" })), "has a number as its role");
    check(chatml, one(json!({ "role": "user" })), "has no content (`content` or `value`)");
    check(chatml, one(json!({ "role": "user", "content": [] })), "as its content, not text");
    check(chatml, one(json!({ "role": "user", "content": null })), "has null as its content");
    check(
        Some("{{ messages | length }}"),
        user_and_assistant(),
        "does not tell where message 2 lies; set assistant_only_loss",
    );
    check(
        Some("{{ 1 | no_such_filter }}"),
        user_and_assistant(),
        "refuses: filter no_such_filter is unknown",
    );
    check(Some("{{ strftime_now('%Q') }}"), user_and_assistant(), "\"%Q\" is no format of a date");
    check(Some("{% for i in range(100000000) %}{% endfor %}"), user_and_assistant(), "refuses: ");
}
