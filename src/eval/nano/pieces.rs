//! The measure of a text's length: roughly the tokens that a tokenizer trained on these tasks would use.

/// Words and punctuation with the space before them, each number, each newline with its indentation.
pub fn pieces(text: &str) -> Vec<&str> {
    let class = |c: char| match c {
        '\n' => 0,
        c if c.is_ascii_alphabetic() => 1,
        c if c.is_ascii_digit() => 2,
        _ => 3,
    };
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut start = 0;
    while start < text.len() {
        let lead = if bytes[start] == b' ' && start + 1 < text.len() { start + 1 } else { start };
        let kind = class(bytes[lead] as char);
        let mut end = lead + 1;
        while end < text.len() {
            let next = bytes[end] as char;
            let joins = if kind == 0 { next == ' ' } else { next != ' ' && class(next) == kind };
            if !joins {
                break;
            }
            end += 1;
        }
        found.push(&text[start..end]);
        start = end;
    }
    found
}
