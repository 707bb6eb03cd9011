//! What a task may be made of: what each part is, and the tables of filters and maps.
//!
//! Templates use named holes, filled by plain replacement: `{p}` the parameter, `{x}` the element, `{v}` the loop variables
//! (often the element itself), `{k}` the filter's literal, `{m}` the map's, `{e}` the mapped element, `{cond}` the filter's
//! condition, `{each}` the comprehension, and `{gen}` the same collapsed to the bare collection when nothing is filtered or
//! mapped (`{arg}` where further arguments follow and a generator needs its own parentheses). In wording, `{nouns}` is the plain
//! plural ("numbers in xs"), `{verb}` the filter's predicate, `{plain}` both together and `{items}` those with the map.

use Kind::{Char, Int, Word};

/// What the elements are when a terminal receives them; it decides which terminals make sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Int,
    Char,
    Word,
    /// A key with its value; maps act on the value and leave an entry.
    Entry,
}

/// The literal that an atom carries into both the comment and the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Literal {
    None,
    Number(i64, i64),
    Letter,
}

#[derive(Debug)]
pub struct Filter {
    pub id: &'static str,
    /// Plural predicates: "are even" completes both "the numbers that ..." and "whether all numbers ...".
    pub verbs: &'static [&'static str],
    pub code: &'static str,
    pub literal: Literal,
}

#[derive(Debug)]
pub struct Map {
    pub id: &'static str,
    pub phrases: &'static [&'static str],
    pub code: &'static str,
    pub kind: Kind,
    pub literal: Literal,
}

/// Whether a terminal wants a filter or a map in front of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    Never,
    Maybe,
    Always,
}

impl Need {
    pub fn allows(self, present: bool) -> bool {
        match self {
            Need::Never => !present,
            Need::Maybe => true,
            Need::Always => present,
        }
    }
}

/// How the elements become the answer, once as an expression and once as a loop; an empty template means "not in this style".
#[derive(Debug)]
pub struct Terminal {
    pub id: &'static str,
    pub phrases: &'static [&'static str],
    pub takes: &'static [Kind],
    pub filter: Need,
    pub map: Need,
    /// Whether the answer depends on the order of the elements; a while loop meets digits from the right.
    pub ordered: bool,
    pub expression: &'static str,
    pub before: &'static str,
    pub guard: &'static str,
    pub step: &'static str,
    pub after: &'static str,
}

/// A collection to work on.
#[derive(Debug)]
pub struct Domain {
    pub id: &'static str,
    pub parameters: &'static [&'static str],
    pub nouns: &'static [&'static str],
    pub each: &'static str,
    pub element: &'static str,
    pub mapped: &'static str,
    pub variables: &'static str,
    pub source: &'static str,
    /// The collection that iterates over the elements alone; differs from `source` where a loop needs keys and values.
    pub whole: &'static str,
    pub kind: Kind,
    pub filters: &'static [&'static [Filter]],
    pub maps: &'static [Map],
    pub shape: Shape,
    pub loops: &'static [Style],
    /// One in so many of the compositions with both a filter and a map is kept, so that the plain ones are not drowned.
    pub thin: u64,
}

/// What arguments the function is called with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Numbers,
    Text,
    Words,
    Table,
    Natural,
    One,
    Two,
}

/// How the body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Style {
    Expression,
    For,
    While,
}

impl Style {
    pub fn id(self) -> &'static str {
        match self {
            Style::Expression => "expression",
            Style::For => "for",
            Style::While => "while",
        }
    }

    /// The sentence around the terminal's phrase.
    pub fn frames(self) -> &'static [&'static str] {
        match self {
            Style::Expression => &["Return {t}.", "Compute {t}.", "Find {t}."],
            Style::For => &["Using a loop, return {t}.", "Loop over {p} and return {t}.", "With a for loop, find {t}."],
            Style::While => &["Using a while loop, return {t}.", "With a while loop, find {t}."],
        }
    }
}

const fn filter(id: &'static str, verbs: &'static [&'static str], code: &'static str, literal: Literal) -> Filter {
    Filter { id, verbs, code, literal }
}

const fn map(id: &'static str, phrases: &'static [&'static str], code: &'static str, kind: Kind, literal: Literal) -> Map {
    Map { id, phrases, code, kind, literal }
}

const SIZE: Literal = Literal::Number(0, 50);
const FACTOR: Literal = Literal::Number(2, 12);
const LENGTH: Literal = Literal::Number(1, 7);

pub const NUMBER_FILTERS: &[Filter] = &[
    filter("even", &["are even", "are divisible by 2"], "{x} % 2 == 0", Literal::None),
    filter("odd", &["are odd", "are not even"], "{x} % 2 == 1", Literal::None),
    filter("above", &["are greater than {k}", "are above {k}", "exceed {k}"], "{x} > {k}", SIZE),
    filter("below", &["are less than {k}", "are below {k}"], "{x} < {k}", SIZE),
    filter("least", &["are at least {k}", "are {k} or more"], "{x} >= {k}", SIZE),
    filter("not", &["are not equal to {k}", "differ from {k}"], "{x} != {k}", SIZE),
    filter("multiple", &["are divisible by {k}", "are multiples of {k}"], "{x} % {k} == 0", Literal::Number(3, 12)),
];
pub const SIGN_FILTERS: &[Filter] = &[
    filter("positive", &["are positive"], "{x} > 0", Literal::None),
    filter("negative", &["are negative"], "{x} < 0", Literal::None),
];
pub const DIVISOR_FILTERS: &[Filter] =
    &[filter("divisor", &["divide {p}", "are divisors of {p}"], "{p} % {x} == 0", Literal::None)];
pub const VALUE_FILTERS: &[Filter] = &[
    filter("even", &["have an even value", "have a value divisible by 2"], "v % 2 == 0", Literal::None),
    filter("odd", &["have an odd value"], "v % 2 == 1", Literal::None),
    filter("above", &["have a value greater than {k}", "have a value above {k}"], "v > {k}", SIZE),
    filter("below", &["have a value less than {k}", "have a value below {k}"], "v < {k}", SIZE),
    filter("not", &["have a value not equal to {k}"], "v != {k}", SIZE),
];
pub const CHAR_FILTERS: &[Filter] = &[
    filter("vowel", &["are vowels"], "{x} in \"aeiou\"", Literal::None),
    filter("novowel", &["are not vowels"], "{x} not in \"aeiou\"", Literal::None),
    filter("digit", &["are digits"], "{x}.isdigit()", Literal::None),
    filter("letter", &["are letters"], "{x}.isalpha()", Literal::None),
    filter("upper", &["are upper case"], "{x}.isupper()", Literal::None),
    filter("lower", &["are lower case"], "{x}.islower()", Literal::None),
    filter("nospace", &["are not spaces"], "{x} != \" \"", Literal::None),
    filter("not", &["are not equal to \"{k}\"", "differ from \"{k}\""], "{x} != \"{k}\"", Literal::Letter),
];
pub const WORD_FILTERS: &[Filter] = &[
    filter("longer", &["are longer than {k}", "have more than {k} letters"], "len({x}) > {k}", LENGTH),
    filter("shorter", &["are shorter than {k}", "have less than {k} letters"], "len({x}) < {k}", LENGTH),
    filter("evenlength", &["have even length"], "len({x}) % 2 == 0", Literal::None),
    filter("starts", &["start with \"{k}\"", "begin with \"{k}\""], "{x}.startswith(\"{k}\")", Literal::Letter),
    filter("ends", &["end with \"{k}\""], "{x}.endswith(\"{k}\")", Literal::Letter),
    filter("contains", &["contain \"{k}\""], "\"{k}\" in {x}", Literal::Letter),
    filter("lacks", &["do not contain \"{k}\""], "\"{k}\" not in {x}", Literal::Letter),
    filter("palindrome", &["are palindromes"], "{x} == {x}[::-1]", Literal::None),
];

pub const NUMBER_MAPS: &[Map] = &[
    map("times", &["times {m}", "multiplied by {m}"], "{x} * {m}", Int, FACTOR),
    map("plus", &["plus {m}", "increased by {m}"], "{x} + {m}", Int, Literal::Number(1, 50)),
    map("minus", &["minus {m}", "decreased by {m}"], "{x} - {m}", Int, Literal::Number(1, 50)),
    map("squared", &["squared", "multiplied by itself"], "{x} * {x}", Int, Literal::None),
    map("modulo", &["modulo {m}"], "{x} % {m}", Int, FACTOR),
    map("divided", &["floor divided by {m}"], "{x} // {m}", Int, FACTOR),
    map("negated", &["negated"], "-{x}", Int, Literal::None),
    map("capped", &["capped at {m}", "limited to {m}"], "min({x}, {m})", Int, SIZE),
    map("text", &["as a string", "as text"], "str({x})", Word, Literal::None),
];
pub const CHAR_MAPS: &[Map] = &[
    map("upper", &["in upper case"], "{x}.upper()", Char, Literal::None),
    map("lower", &["in lower case"], "{x}.lower()", Char, Literal::None),
    map("doubled", &["doubled", "repeated 2 times"], "{x} * 2", Char, Literal::None),
    map("code", &["as its code"], "ord({x})", Int, Literal::None),
];
pub const WORD_MAPS: &[Map] = &[
    map("upper", &["in upper case"], "{x}.upper()", Word, Literal::None),
    map("lower", &["in lower case"], "{x}.lower()", Word, Literal::None),
    map("reversed", &["reversed", "spelled backwards"], "{x}[::-1]", Word, Literal::None),
    map("cut", &["cut to {m} letters"], "{x}[:{m}]", Word, LENGTH),
    map("tail", &["without its first letter"], "{x}[1:]", Word, Literal::None),
    map("length", &["replaced by its length", "as its length"], "len({x})", Int, Literal::None),
];
