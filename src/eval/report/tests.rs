use super::*;

fn write(folder: &Path, name: &str, dtype: &str, setting: &str, passed: u64, tokens_per_forward: f64) {
    let text = format!(
        r#"{{"suite": "nano", "tasks": 100, "passed": {passed}, "pass_at_1": 0.5, "generated_tokens": 100, "forwards": {{"denoise": 50}},
        "tokens_per_forward": {tokens_per_forward}, "decoding_seconds": 1.0, "tokens_per_second": {}, "model": "nano",
        "dtype": "{dtype}", "device": "cpu", "threads": 2, "tasks_seed": 7, "command": "eval nano --json --threads 2 {setting}"}}"#,
        100.0 * tokens_per_forward
    );
    std::fs::write(folder.join(name), text).unwrap();
}

fn two() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "a.json", "f32", "--threshold 0.9", 80, 4.0);
    write(folder.path(), "b.json", "f32", "--steps 8", 80, 1.0);
    folder
}

#[test]
fn results_become_a_table_and_plots() {
    let folder = two();
    let page = page(&[folder.path().into()], &[]).unwrap();
    let [section] = page.sections.as_slice() else { panic!("{:?}", page.sections) };
    let table = &section.tables[0];
    assert_eq!(table.head[..4], ["path", "setting", "in flight", "pass@1"]);
    assert_eq!(table.rows[0][..5], ["nano", "threshold 0.9", "1", "80.0 % (80 of 100)", "71.1 to 86.7"]);
    // A figure that no result has is no column.
    assert!(!table.head.iter().any(|head| head.contains("p90")), "{:?}", table.head);
    let names: Vec<_> = section.plots.iter().map(|plot| plot.name.as_str()).collect();
    assert_eq!(names, ["evaluation-accuracy-forward", "evaluation-accuracy-speed-1"]);
    // 1·80 + 3·80.
    assert!(section.plots[0].svg().contains("AUP 320"), "{}", section.plots[0].svg());
    let measured = [
        "model nano; suite nano; f32; cpu; threads 2; seed 7",
        "lacuna eval nano --json --threads 2, with each of: --threshold 0.9 | --steps 8",
    ];
    assert_eq!(section.provenance, measured);
}

#[test]
fn results_that_are_not_alike_are_refused() {
    let folder = two();
    write(folder.path(), "c.json", "bf16", "--steps 4", 80, 2.0);
    let error = page(&[folder.path().into()], &[]).unwrap_err().to_string();
    assert!(
        error.starts_with("results of 'Accuracy' differ in dtype (f32 in a.json, bf16 in c.json): report them apart"),
        "{error}"
    );
    assert_eq!(page(&[folder.path().into()], &[Trait::Dtype]).unwrap().sections[0].provenance.len(), 3);
    let empty = tempfile::tempdir().unwrap();
    assert!(page(&[empty.path().into()], &[]).unwrap_err().to_string().starts_with("there are no results in "));
}

#[test]
fn an_index_says_what_belongs_together() {
    let folder = two();
    let index = "title = 'All'\nnotes = 'On `x`.'\nlink = '../raw/'\n[[section]]\ntitle = 'One'\nname = 'one'\nresults = ['b*.json']\n\
                 columns = ['setting', 'against_first', 'file']\nplots = []\nnotes = 'Why.'\n";
    std::fs::write(folder.path().join(INDEX), index).unwrap();
    let made = page(&[folder.path().into()], &[]).unwrap();
    let [one, rest] = made.sections.as_slice() else { panic!("{:?}", made.sections) };
    assert_eq!((one.title.as_str(), one.notes.as_str(), one.plots.len()), ("One", "Why.", 0));
    assert_eq!(one.tables[0].rows, [["steps 8", "1.00", "b.json"]]);
    // What no section names is shown nevertheless.
    assert_eq!((rest.title.as_str(), rest.files.as_slice()), ("Accuracy", ["a.json".to_owned()].as_slice()));
    let text = markdown::page(&made, "plots");
    assert!(text.contains("# All\n\nOn `x`.\n\n## One\n\nWhy.\n\n| setting | tokens/s, by the first path's | raw figures |\n| --- | ---: | --- |"), "{text}");
    assert!(text.contains("raw figures: [b.json](../raw/b.json)"), "{text}");

    // An index adds to what results tell, and contradicts nothing.
    for (told, error) in
        [("'a.json' = { command = 'eval' }", "the command of a.json"), ("'z.json' = { device = 'cpu' }", "something of z.json")]
    {
        std::fs::write(folder.path().join(INDEX), format!("{index}[about]\n{told}\n")).unwrap();
        let found = page(&[folder.path().into()], &[]).unwrap_err().to_string();
        assert!(
            found.starts_with(&format!("'about' of the index tells {error}, which tells it itself or is not there")),
            "{found}"
        );
    }
}

#[test]
fn the_page_is_whole_in_one_file() {
    let folder = two();
    let page = page(&[folder.path().into()], &[]).unwrap();
    let html = html::page(&page);
    // As XML too, but for its first line.
    let tree = roxmltree::Document::parse(html.trim_start_matches("<!DOCTYPE html>\n")).unwrap();
    let count = |tag: &str| tree.descendants().filter(|node| node.tag_name().name() == tag).count();
    assert_eq!((count("table"), count("svg"), count("script"), count("img"), count("link")), (1, 2, 0, 0, 0));
    for node in tree.descendants() {
        for attribute in node.attributes().filter(|attribute| ["src", "href"].contains(&attribute.name())) {
            assert!(attribute.value().starts_with('#'), "{} leads elsewhere", attribute.value());
        }
    }
    assert!(!html.contains("@import") && !html.contains("url(http"), "{html}");
}
