//! What a task's function is called with: the edges first, then random values drawn around the task's own literals, since that is
//! where `>` and `>=` part ways.

use rand::seq::SliceRandom;
use rand::{Rng, RngExt};

use super::Draft;
use super::atoms::Shape;
use super::compose::{LETTERS, pick};

/// How many calls follow the edge cases.
const RANDOM_CALLS: usize = 4;

/// How many edge elements come alone as well: in company, "any" and "all" would not show what they make of them.
const ALONE: usize = 3;

/// Argument tuples as Python source.
pub fn draw(rng: &mut impl Rng, draft: &Draft) -> Vec<String> {
    let near = near(&draft.literals);
    match draft.shape {
        Shape::Numbers => with_edges(rng, near.clone(), |rng| number(rng, &near), |list| format!("([{}],)", list.join(", "))),
        Shape::Text => {
            with_edges(rng, characters(draft), |rng| character(rng, draft), |list| format!("({:?},)", list.concat()))
        }
        Shape::Words => {
            with_edges(rng, words(draft), |rng| word(rng, draft), |list| format!("([{}],)", quoted(list).join(", ")))
        }
        Shape::Table => {
            let edges = near.iter().map(|value| format!("{:?}: {value}", word(rng, draft))).collect();
            let entry = |rng: &mut _| format!("{:?}: {}", word(rng, draft), number(rng, &near));
            with_edges(rng, edges, entry, |list| format!("({{{}}},)", list.join(", ")))
        }
        Shape::Natural => {
            let mut values: Vec<i64> = vec![0, 1, 7, 10];
            values.extend(draft.literals.iter().map(|literal| literal + 1));
            values.extend((0..4).map(|_| rng.random_range(11..=60)));
            values.iter().map(|value| format!("({value},)")).collect()
        }
        Shape::One => {
            let mut values = near;
            values.truncate(7);
            values.extend((0..3).map(|_| rng.random_range(-30..=80_i64).to_string()));
            values.iter().map(|value| format!("({value},)")).collect()
        }
        Shape::Two => {
            let mut pairs = vec![(4, 4), (3, 8), (8, 3), (-5, 2)];
            for value in near.iter().take(3) {
                pairs.push((rng.random_range(-20..=20), value.parse().unwrap_or(0)));
            }
            pairs.extend((0..3).map(|_| (rng.random_range(-30..=60), rng.random_range(-30..=60))));
            pairs.iter().map(|(a, b)| format!("({a}, {b})")).collect()
        }
    }
}

/// The empty collection, the sharpest edges alone, all edges together, and random collections, some with repeated elements.
fn with_edges<R: Rng>(
    rng: &mut R,
    mut edges: Vec<String>,
    element: impl Fn(&mut R) -> String,
    render: impl Fn(&[String]) -> String,
) -> Vec<String> {
    let mut calls = vec![render(&[])];
    calls.extend(edges.iter().take(ALONE).map(|edge| render(std::slice::from_ref(edge))));
    edges.shuffle(rng);
    calls.push(render(&edges));
    for _ in 0..RANDOM_CALLS {
        let size = rng.random_range(3..=8);
        let mut list: Vec<String> = (0..size).map(|_| element(rng)).collect();
        let again = pick(rng, &[0, 1, 2]);
        list.push(list[again].clone());
        calls.push(render(&list));
    }
    calls
}

/// Each literal with its neighbours and its double; zero and one where there is none.
fn near(literals: &[i64]) -> Vec<String> {
    let mut values: Vec<i64> = literals.iter().flat_map(|&k| [k, k - 1, k + 1, 2 * k]).collect();
    values.extend([0, -1, 1, 2]);
    let mut seen = std::collections::HashSet::new();
    values.retain(|value| seen.insert(*value));
    values.iter().map(i64::to_string).collect()
}

fn number(rng: &mut impl Rng, near: &[String]) -> String {
    if rng.random_bool(0.4) { near[rng.random_range(0..near.len())].clone() } else { rng.random_range(-20..=60).to_string() }
}

fn characters(draft: &Draft) -> Vec<String> {
    draft.letter.into_iter().chain(["a", "E", "7", "x", "Q", " ", "-", "2", "a"]).map(String::from).collect()
}

fn character(rng: &mut impl Rng, draft: &Draft) -> String {
    let usual = pick(rng, &["b", "k", "u", "z", "A", "T", "3", "9", " ", "!"]);
    match draft.letter {
        Some(letter) if rng.random_bool(0.3) => letter.to_string(),
        _ if rng.random_bool(0.4) => pick(rng, LETTERS).to_string(),
        _ => usual.to_string(),
    }
}

/// The empty word, a palindrome, and words as long as each literal, one less and one more.
fn words(draft: &Draft) -> Vec<String> {
    let mut edges: Vec<String> = Vec::new();
    for &literal in &draft.literals {
        edges.extend(
            [literal - 1, literal, literal + 1].map(|length| "kavobut".chars().cycle().take(length.max(0) as usize).collect()),
        );
    }
    if let Some(letter) = draft.letter {
        edges.extend([format!("{letter}bc"), format!("b{letter}c"), format!("bc{letter}"), letter.to_uppercase()]);
    }
    edges.extend(["level", "", "Noon", "b"].map(String::from));
    edges
}

/// One to eight letters; the task's own letter, if it has one, often stands at either end.
fn word(rng: &mut impl Rng, draft: &Draft) -> String {
    let length = rng.random_range(1..=8);
    let mut text: String = (0..length).map(|_| pick(rng, &["b", "c", "d", "m", "a", "e", "o", "s", "T", "n"])).collect();
    if let Some(letter) = draft.letter {
        match rng.random_range(0..4) {
            0 => text.insert_str(0, letter),
            1 => text.push_str(letter),
            _ => {}
        }
    }
    if rng.random_bool(0.1) { text.chars().chain(text.chars().rev()).collect() } else { text }
}

fn quoted(words: &[String]) -> Vec<String> {
    words.iter().map(|word| format!("{word:?}")).collect()
}
