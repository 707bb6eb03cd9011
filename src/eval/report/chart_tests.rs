use std::collections::HashSet;

use roxmltree::{Document, Node};

use super::*;

const SVG: &str = "http://www.w3.org/2000/svg";

fn chart(curves: usize) -> Chart {
    let dot = |curve: usize, at: usize| Dot {
        x: 1.0 + at as f64,
        y: 90.0 + curve as f64 * 0.1,
        whiskers: Some((88.0, 95.0)),
        label: format!("setting {at}"),
    };
    let axis = |label: &str, scale| Axis { label: label.into(), scale, within: (0.0, 100.0) };
    Chart {
        title: "Accuracy <of> all".into(),
        x: axis("tokens & forwards", Scale::Log),
        y: axis("pass@1", Scale::Linear),
        curves: (0..curves)
            .map(|curve| Curve { name: format!("path {curve}"), dots: (0..3).map(|at| dot(curve, at)).collect() })
            .collect(),
        foot: vec!["model nano; f32; cpu; threads 2; seed 7".into(), "lacuna eval nano".into()],
    }
}

fn elements<'a>(tree: &'a Document, tag: &'a str) -> Vec<Node<'a, 'a>> {
    tree.descendants().filter(|node| node.has_tag_name((SVG, tag))).collect()
}

fn texts(tree: &Document) -> Vec<String> {
    elements(tree, "text").iter().filter_map(|node| node.text().map(str::to_owned)).collect()
}

fn of(node: &Node, name: &str) -> f64 {
    node.attribute(name).unwrap().parse().unwrap()
}

#[test]
fn a_plot_says_what_it_shows() {
    let chart = chart(2);
    let picture = chart.svg();
    let tree = Document::parse(&picture).unwrap();
    let texts = texts(&tree);
    for wanted in ["Accuracy <of> all", "tokens & forwards", "pass@1", "path 0", "path 1", "setting 0", "lacuna eval nano"]
        .into_iter()
        .chain(["model nano; f32; cpu; threads 2; seed 7"])
    {
        assert!(texts.iter().any(|text| text == wanted), "'{wanted}' is not in {texts:?}");
    }
    assert_eq!(elements(&tree, "style").len(), 1);
}

/// Without its classes' colours every curve still differs from every other, by its marker and by its line.
#[test]
fn curves_differ_without_colour() {
    let tree_of = chart(8).svg();
    let tree = Document::parse(&tree_of).unwrap();
    let lines = elements(&tree, "path")
        .into_iter()
        .filter(|node| node.attribute("class").is_some_and(|class| class.starts_with("line ")));
    let dashes: HashSet<_> = lines.map(|node| node.attribute("stroke-dasharray").unwrap_or_default().to_owned()).collect();
    assert_eq!(dashes.len(), 8);
    // A marker's shape without its position, and whether it is filled.
    let shape = |d: &str| {
        let numbers: Vec<f64> = d.split(|c: char| !"-.0123456789".contains(c)).filter_map(|n| n.parse().ok()).collect();
        let letters: String = d.chars().filter(char::is_ascii_alphabetic).collect();
        let relative: Vec<i64> = numbers.iter().skip(2).map(|n| (n - numbers[0]).round() as i64).collect();
        (letters, relative.first().copied())
    };
    let markers =
        elements(&tree, "path").into_iter().filter(|node| node.children().any(|child| child.has_tag_name((SVG, "title"))));
    let names = markers.map(|node| {
        let name = node
            .descendants()
            .find(|child| child.has_tag_name((SVG, "title")))
            .and_then(|title| title.text())
            .unwrap_or_default();
        let class = node.attribute("class").unwrap_or_default().split(' ').next().unwrap_or_default().to_owned();
        (name.split(':').next().unwrap_or_default().to_owned(), class, shape(node.attribute("d").unwrap_or_default()).0)
    });
    let kinds: HashSet<_> = names.collect();
    assert_eq!(kinds.iter().map(|(name, ..)| name).collect::<HashSet<_>>().len(), 8);
    // One kind of marker a curve; corners alone do not tell a triangle from its mirror image, so some share letters.
    assert_eq!(kinds.len(), 8);
}

#[test]
fn no_label_covers_another_and_none_leaves_the_picture() {
    let picture = chart(6).svg();
    let tree = Document::parse(&picture).unwrap();
    let labels: Vec<_> = elements(&tree, "text")
        .into_iter()
        .filter(|node| node.text().is_some_and(|text| text.starts_with("setting") || text.starts_with("path")))
        .collect();
    let boxes: Vec<[f64; 4]> = labels
        .iter()
        .map(|node| {
            [
                of(node, "x"),
                of(node, "y"),
                width(node.text().unwrap_or_default(), of(node, "font-size")),
                of(node, "font-size") - 2.0,
            ]
        })
        .collect();
    for (at, [x, y, w, h]) in boxes.iter().enumerate() {
        assert!(*x >= 0.0 && x + w <= WIDTH && *y - h >= 0.0 && *y <= TOP + PLOT_HEIGHT + 10.0, "{:?}", labels[at].text());
        for [a, b, c, d] in &boxes[..at] {
            assert!(
                x + w <= a + 0.5 || a + c <= x + 0.5 || y - h >= *b || b - d >= *y,
                "{:?} lies on another",
                labels[at].text()
            );
        }
    }
}

#[test]
fn points_lie_where_the_axes_say() {
    let picture = chart(1).svg();
    let tree = Document::parse(&picture).unwrap();
    // The label of a tick stands under it, and the line begins there.
    let tick = elements(&tree, "text").into_iter().find(|node| node.text() == Some("1")).unwrap();
    let line = elements(&tree, "path").into_iter().find(|node| node.attribute("class") == Some("line c0")).unwrap();
    let d = line.attribute("d").unwrap();
    assert!(d.starts_with(&format!("M{} ", tick.attribute("x").unwrap())), "{d}");
    let y = |label: &str| of(&elements(&tree, "text").into_iter().find(|node| node.text() == Some(label)).unwrap(), "y") - 4.0;
    let at: f64 = d.split([' ', 'L']).nth(1).unwrap().parse().unwrap();
    assert!((at - y("90")).abs() < 0.2, "{at} and {}", y("90"));
}

#[test]
fn ticks_are_round_numbers() {
    let linear = Axis { label: String::new(), scale: Scale::Linear, within: (0.0, 100.0) };
    let range = Range::new(&linear, &[96.5, 99.0], 0.0, 100.0);
    assert_eq!(range.ticks, [96.5, 97.0, 97.5, 98.0, 98.5, 99.0]);
    let range = Range::new(&linear, &[0.0, 100.0], 0.0, 100.0);
    assert_eq!((range.low, range.high), (0.0, 100.0));
    assert_eq!(log_ticks(0.9, 30.0), [1.0, 2.0, 5.0, 10.0, 20.0]);
    assert_eq!(log_ticks(2000.0, 9000.0), [2000.0, 3000.0, 4000.0, 5000.0, 7000.0]);
    assert_eq!(log_ticks(2000.0, 3000.0), [2000.0, 2200.0, 2400.0, 2600.0, 2800.0, 3000.0]);
    let whole = Axis { scale: Scale::Whole, ..linear.clone() };
    assert_eq!(Range::new(&whole, &[3.0, 1.0, 3.0], 0.0, 100.0).ticks, [1.0, 3.0]);
    // One value alone is not divided by nothing.
    let range = Range::new(&linear, &[5.0], 0.0, 100.0);
    assert!(range.at(5.0).is_finite() && !range.ticks.is_empty());
}

#[test]
fn figures_have_as_many_digits_as_tell() {
    for (value, told) in [
        (0.0, "0"),
        (1234567.0, "1,234,567"),
        (4837.4, "4,837"),
        (23.53, "23.5"),
        (0.961, "0.96"),
        (-1500.0, "-1,500"),
        (0.1, "0.1"),
        (99.96, "100"),
    ] {
        assert_eq!(figure(value), told);
    }
}
