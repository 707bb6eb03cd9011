//! Tasks on plain integers: one or two parameters, a condition, and what to return on either side of it.

use rand::Rng;

use super::Draft;
use super::atoms::{Literal, Shape};
use super::compose::{indent, literal, pick};

/// A piece of wording with its code; `{a}` and `{b}` are the parameters, `{k}` is the piece's own literal.
#[derive(Debug)]
pub struct Piece {
    pub id: &'static str,
    phrases: &'static [&'static str],
    code: &'static str,
    literal: Literal,
}

const fn piece(id: &'static str, phrases: &'static [&'static str], code: &'static str, literal: Literal) -> Piece {
    Piece { id, phrases, code, literal }
}

const SIZE: Literal = Literal::Number(0, 50);
const FACTOR: Literal = Literal::Number(2, 12);

/// How many integers there are, what they are called, and what can be asked and returned about them.
#[derive(Debug)]
pub struct Family {
    pub id: &'static str,
    names: &'static [(&'static str, &'static str)],
    pub conditions: &'static [Piece],
    pub arms: &'static [Piece],
    shape: Shape,
    thin: u64,
}

const FAMILIES: &[Family] = &[
    Family {
        id: "one",
        names: &[("n", ""), ("k", ""), ("x", "")],
        conditions: &[
            piece("above", &["{a} is greater than {k}", "{a} is above {k}"], "{a} > {k}", SIZE),
            piece("below", &["{a} is less than {k}", "{a} is below {k}"], "{a} < {k}", SIZE),
            piece("equal", &["{a} is equal to {k}"], "{a} == {k}", SIZE),
            piece("even", &["{a} is even"], "{a} % 2 == 0", Literal::None),
            piece("odd", &["{a} is odd"], "{a} % 2 == 1", Literal::None),
            piece(
                "multiple",
                &["{a} is divisible by {k}", "{a} is a multiple of {k}"],
                "{a} % {k} == 0",
                Literal::Number(3, 12),
            ),
        ],
        arms: &[
            piece("plus", &["{a} plus {k}", "{a} increased by {k}"], "{a} + {k}", SIZE),
            piece("minus", &["{a} minus {k}", "{a} decreased by {k}"], "{a} - {k}", SIZE),
            piece("times", &["{a} times {k}", "{a} multiplied by {k}"], "{a} * {k}", FACTOR),
            piece("modulo", &["{a} modulo {k}"], "{a} % {k}", FACTOR),
            piece("divided", &["{a} floor divided by {k}"], "{a} // {k}", FACTOR),
            piece("square", &["{a} squared"], "{a} * {a}", Literal::None),
            piece("negated", &["{a} negated"], "-{a}", Literal::None),
            piece("constant", &["{k}"], "{k}", SIZE),
        ],
        shape: Shape::One,
        thin: 3,
    },
    Family {
        id: "two",
        names: &[("a", "b"), ("n", "k"), ("x", "y")],
        conditions: &[
            piece("above", &["{a} is greater than {b}", "{a} is above {b}"], "{a} > {b}", Literal::None),
            piece("below", &["{a} is less than {b}", "{a} is below {b}"], "{a} < {b}", Literal::None),
            piece("equal", &["{a} is equal to {b}"], "{a} == {b}", Literal::None),
            piece("even", &["{a} is even"], "{a} % 2 == 0", Literal::None),
            piece("second", &["{b} is greater than {k}", "{b} is above {k}"], "{b} > {k}", SIZE),
        ],
        arms: &[
            piece("sum", &["{a} plus {b}"], "{a} + {b}", Literal::None),
            piece("product", &["{a} times {b}", "{a} multiplied by {b}"], "{a} * {b}", Literal::None),
            piece("difference", &["{a} minus {b}"], "{a} - {b}", Literal::None),
            piece("larger", &["the larger of {a} and {b}", "the maximum of {a} and {b}"], "max({a}, {b})", Literal::None),
            piece("smaller", &["the smaller of {a} and {b}", "the minimum of {a} and {b}"], "min({a}, {b})", Literal::None),
            piece("plus", &["{a} plus {k}", "{a} increased by {k}"], "{a} + {k}", SIZE),
            piece("times", &["{b} times {k}", "{b} multiplied by {k}"], "{b} * {k}", FACTOR),
        ],
        shape: Shape::Two,
        thin: 3,
    },
];

/// Frames of a conditional expression and of an if statement; `{c}` the condition, `{y}` and `{z}` the two results.
const EXPRESSION: &[&str] = &["Return {y} if {c}, otherwise {z}.", "If {c}, return {y}, otherwise {z}."];
const STATEMENT: &[&str] =
    &["Using an if statement, return {y} if {c}, otherwise {z}.", "With an if statement, return {z} unless {c}, then {y}."];

/// One conditional, names and literals still open.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    pub family: &'static Family,
    pub condition: &'static Piece,
    pub yes: &'static Piece,
    pub no: &'static Piece,
    pub statement: bool,
}

impl Choice {
    /// Every combination of two different results, thinned as the family asks.
    pub fn all() -> Vec<Choice> {
        let mut found = Vec::new();
        for family in FAMILIES {
            for condition in family.conditions {
                for yes in family.arms {
                    for no in family.arms.iter().filter(|no| no.id != yes.id) {
                        for statement in [false, true] {
                            let choice = Choice { family, condition, yes, no, statement };
                            if (super::hash(&choice.key()) >> 32).is_multiple_of(family.thin) {
                                found.push(choice);
                            }
                        }
                    }
                }
            }
        }
        found
    }

    pub fn key(&self) -> String {
        let style = if self.statement { "statement" } else { "expression" };
        format!("{}/{}/{}/{}/{}", self.family.id, self.condition.id, self.yes.id, self.no.id, style)
    }

    /// Draws names, literals and wording.
    pub fn draft(&self, rng: &mut impl Rng) -> Draft {
        let (a, b) = pick(rng, self.family.names);
        let mut literals = Vec::new();
        let mut render = |piece: &Piece| {
            let k = literal(rng, piece.literal);
            literals.extend(k.parse::<i64>().ok());
            let fill = |template: &str| template.replace("{a}", a).replace("{b}", b).replace("{k}", &k);
            (fill(pick(rng, piece.phrases)), fill(piece.code))
        };
        let (condition, test) = render(self.condition);
        let (yes, on_true) = render(self.yes);
        let (no, on_false) = render(self.no);
        let frame = pick(rng, if self.statement { STATEMENT } else { EXPRESSION });
        let sentence = frame.replace("{c}", &condition).replace("{y}", &yes).replace("{z}", &no);
        let body = if self.statement {
            format!("if {test}:\n    return {on_true}\nreturn {on_false}")
        } else {
            format!("return {on_true} if {test} else {on_false}")
        };
        let parameters = if b.is_empty() { a.to_string() } else { format!("{a}, {b}") };
        Draft { sentence, parameters, body: indent(&body, 1), shape: self.family.shape, literals, letter: None }
    }
}
