//! The instruction set in guanaco form: people ask about the same world, and an assistant answers in one
//! plain sentence. Each fact is asked for in several ways, so that a held-out row's fact occurs in others.

use super::stories::counted;
use super::world::*;
use trainer::rng;

/// The seed of the rows that ship.
pub const SEED: u64 = 41;

/// The rows, in an order drawn by `seed`.
pub fn rows(seed: u64) -> Vec<String> {
    let mut rows = Vec::new();
    animals(&mut rows);
    things(&mut rows);
    opposites(&mut rows);
    sums(&mut rows);
    days(&mut rows);
    lists(&mut rows);
    let key = rng::key(seed, "instruct");
    let order = rng::permutation(key, rows.len());
    // Every sixth row goes on for a second turn.
    let turn = |(place, row): (usize, usize)| match place % 6 {
        0 => format!("{}{}", rows[row], THANKS[place / 6 % THANKS.len()]),
        _ => rows[row].clone(),
    };
    order.into_iter().enumerate().map(turn).collect()
}

const THANKS: &[&str] = &[
    "### Human: Thank you!### Assistant: You are welcome!",
    "### Human: Thanks a lot.### Assistant: You are welcome!",
    "### Human: Are you sure?### Assistant: Yes, I am sure.",
    "### Human: Goodbye!### Assistant: Goodbye! Ask me again any time.",
];

fn ask(rows: &mut Vec<String>, questions: &[String], answer: &str) {
    rows.extend(questions.iter().map(|question| format!("### Human: {question}### Assistant: {answer}")));
}

fn animals(rows: &mut Vec<String>) {
    for Animal { name, colour, home, food, sound } in ANIMALS {
        let a = article(name);
        ask(
            rows,
            &[
                format!("Where does {a} {name} live?"),
                format!("Where does the {name} live?"),
                format!("Where can I find {a} {name}?"),
                format!("Tell me where the {name} lives."),
            ],
            &format!("The {name} lives {home}."),
        );
        ask(
            rows,
            &[
                format!("What does {a} {name} eat?"),
                format!("What does the {name} eat?"),
                format!("Tell me what the {name} eats."),
            ],
            &format!("The {name} eats {food}."),
        );
        ask(
            rows,
            &[
                format!("What does {a} {name} say?"),
                format!("What does the {name} say?"),
                format!("Tell me what the {name} says."),
            ],
            &format!("The {name} says {sound}."),
        );
        ask(
            rows,
            &[
                format!("What colour is {a} {name}?"),
                format!("What colour is the {name}?"),
                format!("Tell me the colour of the {name}."),
            ],
            &format!("The {name} is {colour}."),
        );
        ask(
            rows,
            &[format!("Tell me about the {name}."), format!("What do you know about the {name}?")],
            &format!("The {name} is {colour}. It lives {home} and eats {food}. It says {sound}!"),
        );
    }
}

fn things(rows: &mut Vec<String>) {
    for (thing, colour) in THINGS {
        ask(
            rows,
            &[
                format!("What colour is the {thing}?"),
                format!("Which colour is the {thing}?"),
                format!("Tell me the colour of the {thing}."),
            ],
            &format!("The {thing} is {colour}."),
        );
    }
}

fn opposites(rows: &mut Vec<String>) {
    for (a, b) in OPPOSITES.iter().flat_map(|(a, b)| [(a, b), (b, a)]) {
        ask(
            rows,
            &[
                format!("What is the opposite of {a}?"),
                format!("Tell me the opposite of {a}."),
                format!("It is not {a}. What is it?"),
            ],
            &format!("The opposite of {a} is {b}."),
        );
    }
}

fn sums(rows: &mut Vec<String>) {
    for a in 1..LARGEST_SUM {
        for b in 1..=LARGEST_SUM - a {
            let sum = a + b;
            ask(
                rows,
                &[format!("What is {a} + {b}?"), format!("How much is {a} + {b}?")],
                &format!("{a} + {b} = {sum}."),
            );
        }
    }
}

fn days(rows: &mut Vec<String>) {
    for (i, day) in DAYS.iter().enumerate() {
        let next = DAYS[(i + 1) % DAYS.len()];
        ask(
            rows,
            &[
                format!("Which day comes after {day}?"),
                format!("What day is it after {day}?"),
                format!("Today is {day}. What day is tomorrow?"),
            ],
            &format!("After {day} comes {next}."),
        );
    }
}

fn lists(rows: &mut Vec<String>) {
    for n in 3..=LARGEST_SUM as usize {
        ask(
            rows,
            &[format!("Count to {n}."), format!("Can you count to {n}?")],
            &format!("Of course: {}.", counted(n)),
        );
    }
    for colour in ["green", "white", "yellow", "black", "brown", "grey"] {
        let animals: Vec<_> = ANIMALS.iter().filter(|a| a.colour == colour).map(|a| a.name).collect();
        let things: Vec<_> = THINGS.iter().filter(|(_, c)| *c == colour).map(|(thing, _)| *thing).collect();
        let named = [&animals[..], &things[..]]
            .concat()
            .iter()
            .take(2)
            .map(|n| format!("the {n}"))
            .collect::<Vec<_>>();
        ask(
            rows,
            &[format!("Name two {colour} things."), format!("Which things are {colour}?")],
            &format!("{} are {colour}.", capital(&named.join(" and "))),
        );
    }
    ask(
        rows,
        &["Hello!".into(), "Hi there!".into(), "Good day!".into()],
        "Hello! What would you like to know?",
    );
    ask(
        rows,
        &["Who are you?".into(), "What can you do?".into()],
        "I am a small assistant. Ask me about animals, colours and numbers.",
    );
}
