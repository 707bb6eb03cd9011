//! The page as Markdown, with its plots in files beside it.

use std::fmt::Write;

use super::Page;
use super::table::Table;

/// `plots` is the plots' folder as seen from the page.
pub fn page(page: &Page, plots: &str) -> String {
    let mut text = format!("<!-- Made by `lacuna report`; what is written here is lost. -->\n\n# {}\n", page.title);
    let mut paragraph = |lines: &str| {
        // Writing to a string does not fail.
        let _ = write!(text, "\n{}\n", lines.trim());
    };
    if !page.notes.is_empty() {
        paragraph(&page.notes);
    }
    for section in &page.sections {
        paragraph(&format!("## {}", section.title));
        if !section.notes.is_empty() {
            paragraph(&section.notes);
        }
        section.tables.iter().for_each(|table| paragraph(&markup(table)));
        for plot in &section.plots {
            paragraph(&format!("![{}]({plots}/{}.svg)", plot.title(), plot.name));
            if !plot.notes.is_empty() {
                paragraph(&plot.notes.join(" "));
            }
        }
        let files = section.files.iter().map(|file| match page.link.as_str() {
            "" => format!("`{file}`"),
            link => format!("[{file}]({link}{file})"),
        });
        let measured: Vec<_> = section.provenance.iter().map(|line| format!("- {}", code(line))).collect();
        paragraph(&format!(
            "Measured with:\n\n{}\n- raw figures: {}",
            measured.join("\n"),
            files.collect::<Vec<_>>().join(", ")
        ));
    }
    text
}

fn markup(table: &Table) -> String {
    let row = |cells: Vec<String>| format!("| {} |", cells.join(" | "));
    let rule = table.is_text.iter().map(|text| if *text { "---".into() } else { "---:".into() }).collect();
    let rows = table.rows.iter().map(|cells| row(cells.iter().map(|cell| cell.replace('|', "\\|")).collect()));
    [row(table.head.clone()), row(rule)].into_iter().chain(rows).collect::<Vec<_>>().join("\n")
}

/// A command in a span of code; other lines are words.
fn code(line: &str) -> String {
    if line.starts_with("lacuna ") || line.starts_with("python ") { format!("`{line}`") } else { line.to_owned() }
}
