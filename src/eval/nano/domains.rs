//! The collections that tasks work on, each with the filters and maps that apply to its elements.

use super::atoms::Kind::{Char, Entry, Word};
use super::atoms::*;

const BOTH: &[Style] = &[Style::Expression, Style::For];

/// A list of integers; the other domains say only where they differ.
const NUMBERS: Domain = Domain {
    id: "numbers",
    parameters: &["xs", "numbers", "values"],
    nouns: &["numbers in {p}", "integers in {p}"],
    each: "each",
    element: "x",
    mapped: "x",
    variables: "x",
    source: "{p}",
    whole: "{p}",
    kind: Kind::Int,
    filters: &[NUMBER_FILTERS, SIGN_FILTERS],
    maps: NUMBER_MAPS,
    shape: Shape::Numbers,
    loops: BOTH,
    thin: 12,
};

pub const DOMAINS: &[Domain] = &[
    NUMBERS,
    Domain {
        id: "text",
        parameters: &["s", "text"],
        nouns: &["characters in {p}", "characters of {p}"],
        element: "c",
        mapped: "c",
        variables: "c",
        kind: Char,
        filters: &[CHAR_FILTERS],
        maps: CHAR_MAPS,
        shape: Shape::Text,
        thin: 4,
        ..NUMBERS
    },
    Domain {
        id: "words",
        parameters: &["words", "names"],
        nouns: &["strings in {p}", "words in {p}"],
        element: "w",
        mapped: "w",
        variables: "w",
        kind: Word,
        filters: &[WORD_FILTERS],
        maps: WORD_MAPS,
        shape: Shape::Words,
        thin: 12,
        ..NUMBERS
    },
    Domain {
        id: "keys",
        parameters: &["d", "table", "scores"],
        nouns: &["keys in {p}", "keys of {p}"],
        element: "k",
        mapped: "k",
        variables: "k, v",
        source: "{p}.items()",
        kind: Word,
        filters: &[VALUE_FILTERS],
        maps: WORD_MAPS,
        shape: Shape::Table,
        thin: 12,
        ..NUMBERS
    },
    Domain {
        id: "values",
        parameters: &["d", "table", "scores"],
        nouns: &["values in {p}", "values of {p}"],
        element: "v",
        mapped: "v",
        variables: "v",
        source: "{p}.values()",
        whole: "{p}.values()",
        shape: Shape::Table,
        thin: 20,
        ..NUMBERS
    },
    Domain {
        id: "entries",
        parameters: &["d", "table", "scores"],
        nouns: &["entries in {p}", "entries of {p}"],
        each: "each value",
        element: "k",
        mapped: "v",
        variables: "k, v",
        source: "{p}.items()",
        kind: Entry,
        filters: &[VALUE_FILTERS],
        shape: Shape::Table,
        thin: 2,
        ..NUMBERS
    },
    Domain {
        id: "range",
        parameters: &["n", "limit"],
        nouns: &["integers from 1 to {p}", "numbers from 1 to {p}"],
        source: "range(1, {p} + 1)",
        whole: "range(1, {p} + 1)",
        filters: &[NUMBER_FILTERS, DIVISOR_FILTERS],
        shape: Shape::Natural,
        thin: 20,
        ..NUMBERS
    },
    Domain {
        id: "digits",
        parameters: &["n", "limit"],
        nouns: &["digits of {p}", "digits in {p}"],
        source: "map(int, str({p}))",
        whole: "map(int, str({p}))",
        filters: &[NUMBER_FILTERS],
        shape: Shape::Natural,
        loops: &[Style::Expression, Style::While],
        thin: 12,
        ..NUMBERS
    },
];
