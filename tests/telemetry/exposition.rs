//! Prometheus' text format, read strictly: what promtool would complain of, this refuses.

use std::collections::{BTreeMap, BTreeSet};

/// One scrape.
#[derive(Debug, Default)]
pub struct Scrape {
    /// Types by name.
    pub types: BTreeMap<String, String>,
    /// Values by name and labels, as they are written.
    samples: BTreeMap<(String, BTreeMap<String, String>), f64>,
}

impl Scrape {
    pub fn parse(text: &str) -> Self {
        let (mut scrape, mut helped) = (Self::default(), BTreeSet::new());
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').expect("a help text");
                assert!(helped.insert(name.to_owned()), "{name} has help twice");
                assert!(help.ends_with('.') && help.starts_with(char::is_uppercase), "{line}");
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').expect("a type");
                assert!(helped.contains(name), "{name} has no help before its type");
                assert!(scrape.types.insert(name.into(), kind.into()).is_none(), "{name} has two types");
            } else {
                scrape.sample(line);
            }
        }
        scrape.check();
        scrape
    }

    fn sample(&mut self, line: &str) {
        let (series, value) = line.rsplit_once(' ').expect("a value");
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let mut rest = labels.strip_suffix('}').expect("closed labels");
        let mut labels = BTreeMap::new();
        while !rest.is_empty() {
            let (key, quoted) = rest.split_once("=\"").expect("a label");
            let (value, more) = quoted.split_once('"').expect("a closed value");
            assert!(!value.contains('\\'), "{line}");
            assert!(labels.insert(key.into(), value.into()).is_none(), "{line}");
            rest = more.strip_prefix(',').unwrap_or(more);
        }
        let value = value.parse().unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(self.samples.insert((name.into(), labels), value).is_none(), "twice: {line}");
    }

    fn check(&self) {
        for (name, kind) in &self.types {
            let word = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            assert!(name.starts_with("lacuna_") && name.split('_').all(word), "{name}");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name} is a {kind}");
            for unit in ["_milliseconds", "_ms", "_seconds_total_seconds", "_count", "_sum", "_bucket", "_kb"] {
                assert!(!name.ends_with(unit), "{name}");
            }
            // OpenMetrics has one name for a counter and its family.
            assert!(!self.types.contains_key(name.strip_suffix("_total").unwrap_or("")), "{name} has a twin");
        }
        for (name, labels) in self.samples.keys() {
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| {
                let family = name.strip_suffix(suffix)?;
                (self.types.get(family)? == "histogram").then_some(family)
            });
            assert!(family.is_some() || self.types.contains_key(name), "{name} has no type");
            assert!(labels.len() <= 4, "{name}: {labels:?}");
        }
        for (name, _) in self.types.iter().filter(|(_, kind)| *kind == "histogram") {
            self.check_histogram(name);
        }
    }

    /// Buckets go up to what the count says.
    fn check_histogram(&self, name: &str) {
        let mut series: BTreeMap<BTreeMap<String, String>, Vec<(f64, f64)>> = BTreeMap::new();
        for ((_, labels), count) in self.samples.iter().filter(|((found, _), _)| *found == format!("{name}_bucket")) {
            let mut labels = labels.clone();
            let bound = labels.remove("le").expect("a bound");
            series.entry(labels).or_default().push((bound.parse().expect("a number"), *count));
        }
        for (labels, mut buckets) in series {
            buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
            assert!(buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{name}: {buckets:?}");
            let (last, all) = buckets.pop().expect("a bucket");
            assert_eq!(last, f64::INFINITY, "{name}");
            assert_eq!(self.samples.get(&(format!("{name}_count"), labels.clone())), Some(&all), "{name}");
            assert!(self.samples.contains_key(&(format!("{name}_sum"), labels)), "{name}");
        }
    }

    /// The sum of all series of `name` with these labels; 0 where there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let fits =
            |found: &BTreeMap<String, String>| labels.iter().all(|(key, value)| found.get(*key).is_some_and(|v| v == value));
        self.samples.iter().filter(|((found, of), _)| found == name && fits(of)).map(|(_, value)| value).sum()
    }

    /// The values of a label.
    pub fn values(&self, label: &str) -> BTreeSet<&str> {
        self.samples.keys().filter_map(|(_, labels)| labels.get(label).map(String::as_str)).collect()
    }
}
