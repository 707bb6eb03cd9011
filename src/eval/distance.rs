//! How far two texts are from one another.

/// Characters (Unicode scalar values) to insert, delete or replace so that one text becomes the other (Levenshtein, 1966). Takes time
/// in the product of what is left of both without their common beginning and end, and memory in `b`.
pub fn levenshtein(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let (mut a, mut b) = (a.as_slice(), b.as_slice());
    let alike = a.iter().zip(b).take_while(|(one, other)| one == other).count();
    (a, b) = (&a[alike..], &b[alike..]);
    let alike = a.iter().rev().zip(b.iter().rev()).take_while(|(one, other)| one == other).count();
    (a, b) = (&a[..a.len() - alike], &b[..b.len() - alike]);
    // From what has been read of `a` to each beginning of `b`.
    let mut distances: Vec<usize> = (0..=b.len()).collect();
    for (read, one) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut distances[0], read + 1);
        for (at, other) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(one != other);
            diagonal = distances[at + 1];
            distances[at + 1] = replaced.min(diagonal + 1).min(distances[at] + 1);
        }
    }
    distances[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_distances() {
        for (a, b, distance) in
            [("", "", 0), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "äöü", 3), ("abc", "abc", 0), ("ab", "ba", 2)]
        {
            assert_eq!((levenshtein(a, b), levenshtein(b, a)), (distance, distance), "{a} {b}");
        }
    }

    /// The definition, word for word.
    fn recursive(a: &[char], b: &[char]) -> usize {
        match (a, b) {
            ([], rest) | (rest, []) => rest.len(),
            ([one, a_rest @ ..], [other, b_rest @ ..]) if one == other => recursive(a_rest, b_rest),
            ([_, a_rest @ ..], [_, b_rest @ ..]) => {
                1 + recursive(a_rest, b).min(recursive(a, b_rest)).min(recursive(a_rest, b_rest))
            }
        }
    }

    proptest! {
        #[test]
        fn it_is_what_the_definition_says(a in "[abé]{0,6}", b in "[abé]{0,6}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(levenshtein(&a, &b), recursive(&chars(&a), &chars(&b)));
        }
    }
}
