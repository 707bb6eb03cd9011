//! The page as one HTML file that needs nothing else: no script, no other file, no network.

use std::fmt::Write;

use super::svg::escape;
use super::table::Table;
use super::{Page, Section};

const STYLE: &str = "\
:root{color-scheme:light dark}\
body{margin:0 auto;max-width:60rem;padding:1.5rem 1rem 4rem;font:16px/1.5 system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;\
background:#fff;color:#1b1b1b}\
h1{font-size:1.7rem}h2{font-size:1.3rem;margin-top:2.5rem;border-bottom:1px solid #ccc;padding-bottom:.2rem}\
nav ul{columns:2;padding-left:1.2rem}a{color:#0a5c9e}.scroll{overflow-x:auto}\
table{border-collapse:collapse;font-size:.85rem;margin:1rem 0;font-variant-numeric:tabular-nums}\
th,td{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}\
th{border-bottom:2px solid #888;vertical-align:bottom;white-space:normal}.t{text-align:left}\
figure{margin:1.5rem 0}figcaption{font-size:.85rem;color:#555}svg{max-width:100%;height:auto}\
code,.with{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.8rem}.with{color:#555;list-style:none;padding:0;overflow-wrap:anywhere}\
@media(prefers-color-scheme:dark){body{background:#15181c;color:#e8e8e8}a{color:#6cb6f5}th,td,h2{border-color:#3a4047}figcaption,.with{color:#a8adb3}}\
@page{margin:1.2cm}@media print{body{max-width:none;padding:0;font-size:13px;background:#fff;color:#000}nav{display:none}figure,tr{break-inside:avoid}h2{break-after:avoid}.scroll{overflow:visible}.with{font-size:.65rem}table{font-size:.62rem}th,td{white-space:normal;padding:.12rem .25rem}}";

pub fn page(page: &Page) -> String {
    let title = escape(&page.title);
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{}",
        prose(&page.notes)
    );
    let mut add = |markup: std::fmt::Arguments| {
        // Writing to a string does not fail.
        let _ = writeln!(html, "{markup}");
    };
    if page.sections.len() > 1 {
        let entry = |(at, section): (usize, &Section)| format!("<li><a href=\"#s{at}\">{}</a></li>", escape(&section.title));
        let entries: String = page.sections.iter().enumerate().map(entry).collect();
        add(format_args!("<nav><ul>{entries}</ul></nav>"));
    }
    for (at, section) in page.sections.iter().enumerate() {
        add(format_args!("<section id=\"s{at}\">\n<h2>{}</h2>\n{}", escape(&section.title), prose(&section.notes)));
        section.tables.iter().for_each(|table| add(format_args!("{}", markup(table))));
        for plot in &section.plots {
            let caption = escape(&plot.notes.join(" "));
            add(format_args!("<figure>\n{}<figcaption>{caption}</figcaption>\n</figure>", plot.svg()));
        }
        let files = format!("raw figures: {}", section.files.join(", "));
        let lines = section.provenance.iter().chain([&files]).map(|line| format!("<li>{}</li>", escape(line)));
        add(format_args!("<ul class=\"with\">{}</ul>\n</section>", lines.collect::<String>()));
    }
    add(format_args!("</body>\n</html>"));
    html
}

fn markup(table: &Table) -> String {
    let class = |column: usize| if table.is_text.get(column).copied().unwrap_or_default() { " class=\"t\"" } else { "" };
    let head = table.head.iter().enumerate().map(|(at, text)| format!("<th scope=\"col\"{}>{}</th>", class(at), escape(text)));
    let row = |cells: &Vec<String>| {
        let cells = cells.iter().enumerate().map(|(at, text)| format!("<td{}>{}</td>", class(at), escape(text)));
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    let rows: String = table.rows.iter().map(row).collect();
    let head: String = head.collect();
    format!("<div class=\"scroll\"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>")
}

/// The little of Markdown that notes use: paragraphs, `code`, **strong** text, and links, which are told by their text alone,
/// since they lead from where the Markdown page lies.
fn prose(markdown: &str) -> String {
    let paragraphs = markdown.split("\n\n").map(str::trim).filter(|paragraph| !paragraph.is_empty());
    paragraphs.map(|paragraph| format!("<p>{}</p>\n", inline(paragraph))).collect()
}

fn inline(text: &str) -> String {
    let code = |(at, part): (usize, &str)| match at % 2 {
        0 => strong(&unlinked(part)),
        _ => format!("<code>{}</code>", escape(part)),
    };
    text.split('`').enumerate().map(code).collect()
}

fn strong(text: &str) -> String {
    let part =
        |(at, part): (usize, &str)| if at % 2 == 0 { escape(part) } else { format!("<strong>{}</strong>", escape(part)) };
    text.split("**").enumerate().map(part).collect()
}

fn unlinked(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, link)) = rest.split_once('[') {
        plain.push_str(before);
        match link.split_once("](").and_then(|(name, target)| Some((name, target.split_once(')')?.1))) {
            Some((name, after)) => {
                plain.push_str(name);
                rest = after;
            }
            None => {
                plain.push('[');
                rest = link;
            }
        }
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_become_paragraphs() {
        let html = prose("A `x < y` and **b**, see [the log](LOG.md).\n\nNext [1].");
        assert_eq!(html, "<p>A <code>x &lt; y</code> and <strong>b</strong>, see the log.</p>\n<p>Next [1].</p>\n");
    }
}
