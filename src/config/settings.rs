//! The closed list of settings: key, kind and default of each. The only place that knows a default; what is not on it is
//! an unknown key.

/// How a setting is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Text,
    Integer,
    Boolean,
    /// From 0 to below 1.
    Share,
    Duration,
    Bytes,
    /// Texts; in a variable, separated by commas.
    List,
    /// Texts by names that the user chooses.
    Map,
    /// `earliest`, `latest`, a time, or offsets by topic and partition.
    Offsets,
}

impl Kind {
    /// What is allowed, for messages.
    pub fn allowed(self) -> &'static str {
        match self {
            Kind::Text => "a text",
            Kind::Integer => "a whole number, 0 or more",
            Kind::Boolean => "true or false",
            Kind::Share => "a share from 0 to below 1, such as 0.1",
            Kind::Duration => "a duration such as \"10 seconds\", \"500 ms\" or \"1 hour 30 minutes\"",
            Kind::Bytes => "a size such as \"64 MiB\", or a number of bytes",
            Kind::List => "a list of texts",
            Kind::Map => "a table of texts",
            Kind::Offsets => {
                "\"earliest\", \"latest\", a time such as \"2026-03-01T00:00:00Z\", or offsets by topic and partition \
                 such as { telemetry = { 0 = 1200, 1 = 0 } }"
            }
        }
    }
}

#[derive(Debug)]
pub struct Setting {
    /// Sections joined by dots; `*` stands for the index of an entry of a list such as `[[windows]]`.
    pub key: &'static str,
    pub kind: Kind,
    /// As a user would write it. None: required, or absent unless given.
    pub default: Option<&'static str>,
}

const fn required(key: &'static str, kind: Kind) -> Setting {
    Setting { key, kind, default: None }
}

const fn absent(key: &'static str, kind: Kind) -> Setting {
    Setting { key, kind, default: None }
}

const fn default(key: &'static str, kind: Kind, default: &'static str) -> Setting {
    Setting { key, kind, default: Some(default) }
}

pub const SETTINGS: &[Setting] = &[
    required("name", Kind::Text),
    required("source.bootstrap_servers", Kind::Text),
    required("source.topics", Kind::List),
    default("source.starting_offsets", Kind::Offsets, "earliest"),
    // Bounded, since a batch that fails is done again as a whole: the first one on an old topic must not be all of it.
    default("source.max_offsets_per_trigger", Kind::Integer, "1_000_000"),
    absent("source.max_bytes_per_trigger", Kind::Bytes),
    default("source.min_offsets_per_trigger", Kind::Integer, "0"),
    default("source.max_trigger_delay", Kind::Duration, "15 minutes"),
    default("source.fail_on_data_loss", Kind::Boolean, "true"),
    absent("source.kafka", Kind::Map),
    default("trigger.interval", Kind::Duration, "10 seconds"),
    default("trigger.available_now", Kind::Boolean, "false"),
    required("schema.file", Kind::Text),
    absent("schema.extra_column", Kind::Text),
    absent("schema.registry", Kind::Text),
    absent("schema.registry_username", Kind::Text),
    absent("schema.registry_password", Kind::Text),
    absent("transform.filter", Kind::Text),
    absent("transform.columns", Kind::Map),
    required("types.*.name", Kind::Text),
    absent("types.*.topic", Kind::Text),
    absent("types.*.field", Kind::Text),
    absent("types.*.equals", Kind::Text),
    required("types.*.schema", Kind::Text),
    absent("types.*.extra_column", Kind::Text),
    absent("types.*.event_time", Kind::Text),
    absent("types.*.filter", Kind::Text),
    absent("types.*.columns", Kind::Map),
    absent("types.*.table", Kind::Text),
    absent("types.*.partition_by", Kind::List),
    absent("types.*.sort_by", Kind::List),
    absent("types.*.properties", Kind::Map),
    default("types.*.provenance", Kind::Boolean, "true"),
    required("quality.expect.*.name", Kind::Text),
    required("quality.expect.*.sql", Kind::Text),
    absent("quality.expect.*.type", Kind::Text),
    default("quality.expect.*.on_fail", Kind::Text, "warn"),
    absent("quality.max_error_rate", Kind::Share),
    default("quality.min_records", Kind::Integer, "1000"),
    default("quality.window", Kind::Duration, "5 minutes"),
    default("quality.probe_interval", Kind::Duration, "30 seconds"),
    required("event_time.column", Kind::Text),
    default("event_time.watermark_delay", Kind::Duration, "10 minutes"),
    default("event_time.policy", Kind::Text, "partition-min"),
    // Longer than producers take to restart or brokers to change leaders, and half of the default delay.
    default("event_time.idle_timeout", Kind::Duration, "5 minutes"),
    absent("event_time.max_future", Kind::Duration),
    required("rows.table", Kind::Text),
    absent("rows.partition_by", Kind::List),
    absent("rows.sort_by", Kind::List),
    absent("rows.properties", Kind::Map),
    default("rows.provenance", Kind::Boolean, "true"),
    required("windows.*.table", Kind::Text),
    absent("windows.*.type", Kind::Text),
    required("windows.*.size", Kind::Duration),
    absent("windows.*.slide", Kind::Duration),
    default("windows.*.start", Kind::Duration, "0 seconds"),
    absent("windows.*.time_zone", Kind::Text),
    absent("windows.*.filter", Kind::Text),
    absent("windows.*.group_by", Kind::List),
    required("windows.*.aggregates", Kind::Map),
    default("windows.*.late", Kind::Text, "drop"),
    // <table>_late
    absent("windows.*.late_table", Kind::Text),
    absent("windows.*.partition_by", Kind::List),
    absent("windows.*.sort_by", Kind::List),
    absent("windows.*.properties", Kind::Map),
    // <namespace of the rows table, or else of the first window>.dead_letters
    absent("dead_letters.table", Kind::Text),
    absent("dead_letters.partition_by", Kind::List),
    absent("dead_letters.sort_by", Kind::List),
    absent("dead_letters.properties", Kind::Map),
    absent("dead_letters.topic", Kind::Text),
    default("catalog.type", Kind::Text, "sqlite"),
    default("catalog.path", Kind::Text, "data/catalog.db"),
    default("catalog.warehouse", Kind::Text, "data/warehouse"),
    default("maintenance.enabled", Kind::Boolean, "true"),
    default("maintenance.interval", Kind::Duration, "10 minutes"),
    default("maintenance.time_budget", Kind::Duration, "2 minutes"),
    default("maintenance.max_snapshot_age", Kind::Duration, "5 days"),
    // The metadata of a table names every snapshot and is written anew with each commit.
    default("maintenance.max_snapshots", Kind::Integer, "100"),
    default("maintenance.compact_min_files", Kind::Integer, "20"),
    default("maintenance.compact_after", Kind::Duration, "1 hour"),
    default("maintenance.orphan_grace", Kind::Duration, "3 days"),
    // checkpoints/<name>
    absent("checkpoint.location", Kind::Text),
    default("http.listen", Kind::Text, "127.0.0.1:8080"),
    default("retry.strategy", Kind::Text, "exponential"),
    default("retry.initial", Kind::Duration, "200 ms"),
    default("retry.max", Kind::Duration, "30 seconds"),
    default("deadlines.recover", Kind::Duration, "5 minutes"),
    default("deadlines.latest_offsets", Kind::Duration, "30 seconds"),
    default("deadlines.add_batch", Kind::Duration, "10 minutes"),
    default("deadlines.checkpoint", Kind::Duration, "1 minute"),
    default("deadlines.commit", Kind::Duration, "2 minutes"),
    // With execution.buffer and what a batch needs, it fits into a container of 2 GiB.
    default("state.memory_budget", Kind::Bytes, "1 GiB"),
    // The number of cores.
    absent("execution.workers", Kind::Integer),
    default("execution.buffer", Kind::Bytes, "256 MiB"),
    // Below the 30 seconds after which Kubernetes kills.
    default("execution.shutdown_timeout", Kind::Duration, "25 seconds"),
];

/// The setting at a path, `*` matching an index.
pub fn find(path: &[String]) -> Option<&'static Setting> {
    SETTINGS.iter().find(|s| {
        let mut parts = s.key.split('.');
        path.iter().all(|p| parts.next().is_some_and(|k| matches(k, p))) && parts.next().is_none()
    })
}

/// Whether settings lie below the path.
pub fn is_section(path: &[String]) -> bool {
    SETTINGS.iter().any(|s| {
        let mut parts = s.key.split('.');
        path.iter().all(|p| parts.next().is_some_and(|k| matches(k, p))) && parts.next().is_some()
    })
}

/// Whether entries of a list lie at the path: `[[windows]]`, `[[types]]`, `[[quality.expect]]`.
pub fn is_list(path: &[String]) -> bool {
    SETTINGS.iter().any(|s| {
        let mut parts = s.key.split('.');
        path.iter().all(|p| parts.next().is_some_and(|k| matches(k, p))) && parts.next() == Some("*")
    })
}

fn matches(pattern: &str, part: &str) -> bool {
    pattern == part || (pattern == "*" && part.bytes().all(|b| b.is_ascii_digit()))
}

/// What the user may have meant by an unknown key, or else what there is.
pub fn suggestion(path: &[String]) -> String {
    let Some((name, parent)) = path.split_last() else { return String::new() };
    let mut names: Vec<&str> = Vec::new();
    for setting in SETTINGS {
        let parts: Vec<&str> = setting.key.split('.').collect();
        if parts.len() > parent.len() && parent.iter().zip(&parts).all(|(p, k)| matches(k, p)) {
            let sibling = parts[parent.len()];
            if !names.contains(&sibling) {
                names.push(sibling);
            }
        }
    }
    let lower = name.to_ascii_lowercase();
    let near = names.iter().map(|n| (distance(&lower, n), *n)).min();
    if let Some((d, near)) = near
        && d <= 1 + lower.len() / 4
    {
        return format!("did you mean {near}?");
    }
    // The right name in the wrong section.
    if let Some(s) = SETTINGS.iter().find(|s| s.key.rsplit('.').next() == Some(lower.as_str())) {
        return format!(
            "did you mean {}?",
            s.key
                .replace("windows.*", "[[windows]]")
                .replace("types.*", "[[types]]")
                .replace("quality.expect.*", "[[quality.expect]]")
        );
    }
    format!("allowed here: {}", names.join(", "))
}

/// Edits from one word to the other (Levenshtein).
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
