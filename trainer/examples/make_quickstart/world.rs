//! The small world that the quickstart's texts are about: every fact that a story or an answer states.

/// An animal, its colour, where it lives, what it eats, what it says.
pub struct Animal {
    pub name: &'static str,
    pub colour: &'static str,
    pub home: &'static str,
    pub food: &'static str,
    pub sound: &'static str,
}

const fn animal(
    name: &'static str,
    colour: &'static str,
    home: &'static str,
    food: &'static str,
    sound: &'static str,
) -> Animal {
    Animal { name, colour, home, food, sound }
}

pub const ANIMALS: &[Animal] = &[
    animal("frog", "green", "in the pond", "flies", "croak"),
    animal("cow", "brown", "on the farm", "grass", "moo"),
    animal("duck", "yellow", "on the lake", "bread", "quack"),
    animal("pig", "pink", "in the barn", "corn", "oink"),
    animal("bee", "yellow", "in the hive", "honey", "buzz"),
    animal("owl", "brown", "in the tree", "mice", "hoot"),
    animal("fish", "orange", "in the sea", "weeds", "blub"),
    animal("lion", "golden", "in the hills", "meat", "roar"),
    animal("sheep", "white", "in the field", "grass", "baa"),
    animal("mouse", "grey", "in the house", "cheese", "squeak"),
    animal("crow", "black", "in the wood", "seeds", "caw"),
    animal("bear", "brown", "in the cave", "berries", "growl"),
    animal("cat", "black", "in the house", "fish", "meow"),
    animal("hen", "red", "in the coop", "seeds", "cluck"),
    animal("horse", "white", "in the stable", "hay", "neigh"),
    animal("wolf", "grey", "in the forest", "meat", "howl"),
    animal("parrot", "green", "in the jungle", "nuts", "squawk"),
    animal("snake", "green", "in the sand", "eggs", "hiss"),
];

/// Things and their colours.
pub const THINGS: &[(&str, &str)] = &[
    ("sky", "blue"),
    ("sun", "yellow"),
    ("grass", "green"),
    ("snow", "white"),
    ("coal", "black"),
    ("rose", "red"),
    ("carrot", "orange"),
    ("plum", "purple"),
    ("cloud", "white"),
    ("leaf", "green"),
    ("banana", "yellow"),
    ("apple", "red"),
    ("sea", "blue"),
    ("milk", "white"),
    ("mud", "brown"),
    ("stone", "grey"),
];

/// Words and their opposites; both ways are facts.
pub const OPPOSITES: &[(&str, &str)] = &[
    ("big", "small"),
    ("hot", "cold"),
    ("up", "down"),
    ("happy", "sad"),
    ("fast", "slow"),
    ("old", "new"),
    ("wet", "dry"),
    ("open", "shut"),
    ("near", "far"),
    ("hard", "soft"),
    ("long", "short"),
    ("loud", "quiet"),
    ("full", "empty"),
    ("light", "dark"),
    ("clean", "dirty"),
    ("early", "late"),
];

pub const DAYS: &[&str] = &["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

pub const CHILDREN: &[(&str, &str)] = &[
    ("Tom", "he"),
    ("Mia", "she"),
    ("Ben", "he"),
    ("Lily", "she"),
    ("Sam", "he"),
    ("Anna", "she"),
    ("Max", "he"),
    ("Zoe", "she"),
];

/// Things that one can count.
pub const COUNTABLE: &[&str] = &["apples", "stones", "shells", "nuts", "eggs", "coins"];

/// Sums `a + b` up to this are part of the world.
pub const LARGEST_SUM: u32 = 10;

/// `a` or `an` before a word.
pub fn article(word: &str) -> &'static str {
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" }
}

/// The word with a capital first letter.
pub fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
