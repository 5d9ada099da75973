//! What the base model is pretrained on: children's stories and little lessons that state the world's facts.
//! Questions occur as people ask them in a story, and nobody answers them the way an assistant does.

use super::world::*;
use trainer::rng;

/// Draws that depend on a seed and a document's number alone.
struct Draw {
    key: u64,
    drawn: u64,
}

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.drawn += 1;
        (rng::uniform(self.key, self.drawn) * n as f64) as usize
    }

    fn one<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    fn shuffled<T>(&mut self, items: Vec<T>) -> Vec<T> {
        let mut keyed: Vec<_> = items.into_iter().map(|item| (self.below(1 << 30), item)).collect();
        keyed.sort_by_key(|(order, _)| *order);
        keyed.into_iter().map(|(_, item)| item).collect()
    }
}

/// Document number `index` of the corpus under `seed`.
pub fn document(seed: u64, index: u64) -> String {
    let mut draw = Draw { key: rng::key(seed, &format!("story {index}")), drawn: 0 };
    let draw = &mut draw;
    let (title, body) = match draw.below(10) {
        0..=2 => visit(draw),
        3 | 4 => lesson(draw),
        5 => colours(draw),
        6 | 7 => opposites(draw),
        8 => sums(draw),
        _ => days(draw),
    };
    // Headings of any kind, so that the base goes on with a story behind every kind.
    let heading = |draw: &mut Draw| match draw.below(2) {
        0 => format!("### {} {}: ", draw.one(HEADINGS), 1 + draw.below(9)),
        _ => format!("### {}: ", draw.one(HEADINGS)),
    };
    match draw.below(4) {
        0 => format!("{}{title}{}{body}", heading(draw), heading(draw)),
        1 => format!("{}{body}", heading(draw)),
        _ => body,
    }
}

const HEADINGS: &[&str] = &[
    "Chapter", "Story", "Page", "Book", "Lesson", "Part", "Title", "Children", "Teacher", "Animals", "House",
    "All",
];

/// A child meets an animal.
fn visit(draw: &mut Draw) -> (String, String) {
    let (child, she) = *draw.one(CHILDREN);
    let (friend, _) = *draw.one(CHILDREN);
    let Animal { name, colour, home, food, sound } = *draw.one(ANIMALS);
    let begin = match draw.below(3) {
        0 => format!("One day, {child} went for a walk."),
        1 => format!("Once upon a time, {child} and {friend} went out to play."),
        _ => format!("It was a warm day, and {child} was at home."),
    };
    let question = question(draw, name);
    let ask = match draw.below(2) {
        0 => format!(" \"{question}\" asked {friend}. They went to find out."),
        _ => String::new(),
    };
    let meet = match draw.below(2) {
        0 => format!(" There was {} {colour} {name} {home}.", article(colour)),
        _ => format!(" {} saw the {name} {home}. The {name} was {colour}.", capital(she)),
    };
    let act = match draw.below(3) {
        0 => format!(" {child} gave the {name} some {food} to eat, and it said {sound}."),
        1 => format!(" \"{}!\" said the {name}. It ate {food}.", capital(sound)),
        _ => format!(" The {name} said {sound} and ate its {food}."),
    };
    let end = *draw.one(&[
        " Then they all went home.",
        " They were happy all day long.",
        " And that was the end of the day.",
        " It was a good day.",
    ]);
    (question, format!("{begin}{ask}{meet}{act}{end}"))
}

/// What children ask about an animal.
fn question(draw: &mut Draw, name: &str) -> String {
    let a = if draw.below(2) == 0 { "the" } else { article(name) };
    match draw.below(5) {
        0 => format!("Where does {a} {name} live?"),
        1 => format!("What does {a} {name} eat?"),
        2 => format!("What does {a} {name} say?"),
        3 => format!("What colour is {a} {name}?"),
        _ => format!("What about the {name}?"),
    }
}

/// What there is to know about an animal, in any order.
fn lesson(draw: &mut Draw) -> (String, String) {
    let Animal { name, colour, home, food, sound } = *draw.one(ANIMALS);
    let facts = vec![
        format!("The {name} is {colour}."),
        format!("The {name} lives {home}."),
        format!("The {name} eats {food}."),
        format!("The {name} says {sound}."),
    ];
    let begin = match draw.below(3) {
        0 => format!("This is a book about the {name}."),
        1 => format!("{} looked at a picture of {} {name}.", draw.one(CHILDREN).0, article(name)),
        _ => format!("The teacher talked about the {name}."),
    };
    (question(draw, name), format!("{begin} {}", draw.shuffled(facts).join(" ")))
}

fn colours(draw: &mut Draw) -> (String, String) {
    let child = draw.one(CHILDREN).0;
    let seen = [0; 3].map(|_| *draw.one(THINGS));
    let question = format!("What colour is the {}?", seen[0].0);
    let mut text = match draw.below(3) {
        0 => format!("{child} had a box of paint."),
        1 => format!("{child} looked out of the window."),
        _ => format!("\"{question}\" asked {child}."),
    };
    for (thing, colour) in seen {
        text += &match draw.below(3) {
            0 => format!(" The {thing} is {colour}."),
            1 => format!(" The {thing} was {colour}, and {child} liked it."),
            _ => format!(" {child} saw the {thing}. It was {colour}."),
        };
    }
    (question, text)
}

fn opposites(draw: &mut Draw) -> (String, String) {
    let child = draw.one(CHILDREN).0;
    let pairs = [0; 3].map(|_| {
        let (a, b) = *draw.one(OPPOSITES);
        if draw.below(2) == 0 { (a, b) } else { (b, a) }
    });
    let question = format!("What is the opposite of {}?", pairs[0].0);
    let mut text = match draw.below(2) {
        0 => format!("{child} learned new words."),
        _ => format!("\"{question}\" asked {child}."),
    };
    for (a, b) in pairs {
        text += &match draw.below(3) {
            0 => format!(" If it is not {a}, it is {b}."),
            1 => format!(" First it was {a}, then it was {b}."),
            _ => format!(" {} and {b} are opposites.", capital(a)),
        };
    }
    (question, text)
}

fn sums(draw: &mut Draw) -> (String, String) {
    let (child, friend) = (draw.one(CHILDREN).0, draw.one(CHILDREN).0);
    let thing = *draw.one(COUNTABLE);
    let a = 1 + draw.below(LARGEST_SUM as usize - 1);
    let b = 1 + draw.below(LARGEST_SUM as usize - a);
    let sum = a + b;
    let question = format!("What is {a} + {b}?");
    let text = match draw.below(4) {
        0 => format!(
            "{child} had {a} {thing}. {friend} had {b} {thing}. {a} + {b} = {sum}, so they had {sum} {thing}."
        ),
        1 => format!(
            "\"{question}\" asked {friend}. {child} took {a} {thing} and {b} {thing}. {a} + {b} = {sum}."
        ),
        2 => format!("{child} had {sum} {thing} and counted them: {}. {a} + {b} = {sum}.", counted(sum)),
        _ => format!("{child} wrote {a} + {b} = {sum}. {friend} wrote {b} + {a} = {sum}."),
    };
    (question, text)
}

/// `1, 2, 3`.
pub fn counted(n: usize) -> String {
    (1..=n).map(|i| i.to_string()).collect::<Vec<_>>().join(", ")
}

fn days(draw: &mut Draw) -> (String, String) {
    let (child, she) = *draw.one(CHILDREN);
    let first = draw.below(DAYS.len());
    let [day, next, third] = [0, 1, 2].map(|after| DAYS[(first + after) % DAYS.len()]);
    let question = format!("What day comes after {day}?");
    let text = match draw.below(3) {
        0 => format!("{child} went to the sea on {day}. After {day} came {next}, and {she} went home."),
        1 => format!("{day}, {next}, {third}: so the days went by, and {child} played."),
        _ => format!("\"{question}\" asked {child}. Yesterday it was {day}, and now it was {next}."),
    };
    (question, text)
}
