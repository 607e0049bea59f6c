//! What has changed between the configuration that a checkpoint was written with and the one at hand, and what it comes to.
//!
//! Owns: the judgement on every change, which `floe plan` shows and recovery acts on. Does not own: which columns of existing
//! tables can change ([`crate::sink::iceberg`]). Invariant: what is refused here is refused before a table is created or
//! changed and before anything is read; state is dropped only with a consent that names this very batch and these tables.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use tokio::runtime::Handle;

use crate::batch::{BatchId, MicroBatch, Offsets, TopicPartition};
use crate::checkpoint::{Checkpoint, CommitEntry, Recovered, WindowStates};
use crate::config::{Config, Definition, Difference};
use crate::error::Error;
use crate::pipeline::Pipeline;
use crate::state::{self, Numbers, Reader, WindowQuery};
use crate::telemetry::rfc3339;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The query goes on.
    Safe,
    /// It goes on without state that it has, once somebody has agreed to that.
    DropsState,
    /// The state of one window table would have to be computed again from the topics. It goes on without it, once somebody has
    /// agreed to that.
    NeedsRebuild,
    Refused,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Safe => "safe",
            Verdict::DropsState => "drops state",
            Verdict::NeedsRebuild => "needs rebuild",
            Verdict::Refused => "refused",
        })
    }
}

/// One change, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// A setting, `windows <table>` or `table <table>`.
    pub subject: String,
    pub change: String,
    pub verdict: Verdict,
    /// What it comes to, and where it is refused, what to do.
    pub why: String,
    /// From where the open windows of this table would have to be read again; partitions that are not in it from their
    /// earliest offset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub starting_offsets: Option<BTreeMap<String, BTreeMap<String, i64>>>,
}

impl Change {
    pub fn new(
        subject: impl Into<String>,
        change: impl Into<String>,
        verdict: Verdict,
        why: impl Into<String>,
    ) -> Change {
        Change { subject: subject.into(), change: change.into(), verdict, why: why.into(), starting_offsets: None }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<13}  {}: {}\n               {}", self.verdict, self.subject, self.change, self.why)
    }
}

/// All changes since the last committed batch.
#[derive(Debug, Default)]
pub struct Changes {
    /// None: no batch is committed, and nothing can have changed.
    pub since: Option<BatchId>,
    pub list: Vec<Change>,
    /// As they are from the next batch on.
    pub windows: WindowStates,
    /// Window tables whose state is dropped.
    pub drops: BTreeSet<String>,
    /// Somebody has agreed to just that.
    pub agreed: bool,
}

impl Changes {
    /// What stands against going on.
    pub fn obstacles(&self) -> impl Iterator<Item = &Change> {
        self.list.iter().filter(|change| match change.verdict {
            Verdict::Safe => false,
            Verdict::DropsState | Verdict::NeedsRebuild => !self.agreed,
            Verdict::Refused => true,
        })
    }

    /// As an error, if anything stands against going on.
    pub fn check(&self) -> Result<(), Error> {
        let obstacles: Vec<String> = self.obstacles().map(Change::to_string).collect();
        let Some(batch) = self.since.filter(|_| !obstacles.is_empty()) else { return Ok(()) };
        Err(Error::Changes { batch, obstacles: obstacles.join("\n") })
    }
}

/// The open windows of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Open {
    windows: u64,
    /// At most.
    groups: u64,
}

/// Reads the checkpoint and nothing else.
pub async fn assess(
    config: &Config,
    pipeline: &Pipeline,
    checkpoint: &Arc<Checkpoint>,
    recovered: &Recovered,
) -> Result<Changes, Error> {
    let queries = || pipeline.queries.iter().map(|q| (q.table(), q.state_definition()));
    let (Some(commit), Some(logged)) = (&recovered.commit, &recovered.plan) else {
        return Ok(Changes { windows: WindowStates::default().with(queries()), ..Changes::default() });
    };
    let plan = &logged.plan;
    let mut changes = Changes {
        since: Some(commit.batch),
        list: topics(plan, config),
        windows: commit.windows.with(queries()),
        ..Changes::default()
    };
    let after = Definition::of(config);
    let differences = if commit.definition.is_empty() { Vec::new() } else { commit.definition.differences(&after) };
    changes.list.extend(differences.iter().filter_map(setting));
    if let Some(replay) = recovered.replay().filter(|replay| replay.plan.config_fingerprint != config.fingerprint) {
        changes.list.push(pending(&replay.plan, pipeline));
    }
    if commit.windows.is_empty() && !commit.state.is_empty() {
        let why = "an earlier version of Floe wrote the state of open windows: let that version finish them first";
        changes.list.push(Change::new("windows", "their state is of another format", Verdict::Refused, why));
        return Ok(changes);
    }

    let evict_ms = if recovered.replay().is_some() { plan.watermarks.late() } else { plan.watermarks.evict() };
    let same_windows = changes.windows == commit.windows;
    let open = if same_windows { BTreeMap::new() } else { open_windows(checkpoint, commit, evict_ms).await? };
    let windows = Windows { before: &commit.windows, open: &open, differences: &differences, evict_ms };
    let found = windows.judge(&pipeline.queries);
    changes.drops = found.drops;
    changes.list.extend(found.list);
    let mut rebuilds = changes.list.iter_mut().filter(|change| change.verdict == Verdict::NeedsRebuild).peekable();
    if rebuilds.peek().is_some() {
        let logs = checkpoint.logs(commit.batch).await?;
        for change in rebuilds {
            let query = pipeline.queries.iter().find(|q| change.subject == subject(q.table()));
            advise_rebuild(change, &logs, query.and_then(|q| oldest_open_us(q, evict_ms)));
        }
    }
    if !changes.drops.is_empty() {
        changes.agreed = checkpoint.agreed_to_drop(commit.batch, &changes.drops).await?;
    }
    Ok(changes)
}

fn subject(table: &str) -> String {
    format!("windows {table}")
}

/// The open windows by table, as the newest commit has them.
async fn open_windows(
    checkpoint: &Arc<Checkpoint>,
    commit: &CommitEntry,
    evict_ms: i64,
) -> Result<BTreeMap<String, Open>, Error> {
    let tables: Vec<&str> = commit.windows.iter().map(|(table, _)| table).collect();
    let numbers = Numbers::of(&commit.windows, tables.iter().copied());
    let files = Reader::new(checkpoint.clone(), Handle::current(), numbers).open(&commit.state).await?;
    let mut open: BTreeMap<String, Open> = BTreeMap::new();
    for window in state::open_windows(&files, evict_ms) {
        let Some(table) = tables.get(window.query) else { continue };
        let of = open.entry(table.to_string()).or_default();
        of.windows += 1;
        of.groups += window.groups;
    }
    Ok(open)
}

/// A topic that is not read any more leaves its partitions without anyone who answers for their offsets.
fn topics(plan: &MicroBatch, config: &Config) -> Vec<Change> {
    let read: BTreeSet<&str> = plan.ranges.keys().map(|tp| &*tp.topic).collect();
    let wanted: BTreeSet<&str> = config.source.topics.iter().map(String::as_str).collect();
    let removed = read.difference(&wanted).map(|topic| {
        let why = "the checkpoint has its offsets, and going on would forget them. Put it back; or start over with a new \
                   checkpoint and new tables, or a new pipeline name";
        Change::new("source.topics", format!("{topic} removed"), Verdict::Refused, why)
    });
    let added = wanted.difference(&read).map(|topic| {
        let why = "it is read from its earliest offset on";
        Change::new("source.topics", format!("{topic} added"), Verdict::Safe, why)
    });
    removed.chain(added).collect()
}

/// A batch is planned, and not committed, with another configuration.
fn pending(plan: &MicroBatch, pipeline: &Pipeline) -> Change {
    let subject = format!("batch {}", plan.batch);
    let change = "it was planned with the earlier configuration and is not committed";
    let tables: BTreeSet<&str> = pipeline.tables.iter().map(|t| t.name.as_str()).collect();
    let planned: BTreeSet<&str> = plan.tables.keys().map(String::as_str).collect();
    match tables == planned {
        true => {
            let why =
                "it is executed with the configuration as it is now, unless a table has it already: then run refuses";
            Change::new(subject, change, Verdict::Safe, why)
        }
        false => Change::new(subject, change, Verdict::Refused, Error::ConfigChanged { batch: plan.batch }.to_string()),
    }
}

/// Settings other than topics and windows.
fn setting(difference: &Difference) -> Option<Change> {
    let Difference { setting, before, after } = difference;
    let name = match setting.strip_prefix("types.").and_then(|rest| rest.split_once('.')) {
        Some((_, name)) => name,
        None => setting.as_str(),
    };
    let section = name.split('.').next().unwrap_or_default();
    let why = match (section, name) {
        ("windows", _) | (_, "source.topics") => return None,
        (_, "source.bootstrap_servers") => "the topics there have to be the same ones: run compares their ids",
        ("schema" | "transform" | "quality" | "when", _) => {
            "it holds for the records of the next batch on; what is committed, or in open windows, stays as it was read"
        }
        (_, "rows.table") => {
            "rows go there from the next batch on; a table that is not written any more stays as it is"
        }
        (_, "event_time.column") => "the watermark stays where it is and never goes back: rows behind it are late",
        (_, "event_time.watermark_delay") => {
            "the watermark never goes back: after a longer delay it waits, after a shorter one it moves with the next batch"
        }
        ("event_time", _) => "it holds from the next batch on, and the watermark goes on from where it is",
        ("catalog", _) => "the tables there have to be the same ones: run compares their UUIDs",
        _ => "it holds from the next batch on",
    };
    let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "not set".into());
    Some(Change::new(setting, format!("{} -> {}", shown(before), shown(after)), Verdict::Safe, why))
}

struct Windows<'a> {
    before: &'a WindowStates,
    /// Of those tables whose windows have become others or are gone.
    open: &'a BTreeMap<String, Open>,
    differences: &'a [Difference],
    evict_ms: i64,
}

#[derive(Default)]
struct Judged {
    list: Vec<Change>,
    drops: BTreeSet<String>,
}

impl Windows<'_> {
    fn judge(&self, queries: &[WindowQuery]) -> Judged {
        let after: BTreeMap<&str, &str> = queries.iter().map(|q| (q.table(), q.state_definition())).collect();
        self.judge_definitions(&after)
    }

    fn judge_definitions(&self, after: &BTreeMap<&str, &str>) -> Judged {
        let before: BTreeMap<&str, &str> =
            self.before.iter().map(|(t, state)| (t, state.definition.as_str())).collect();
        let mut judged = Judged::default();
        for table in before.keys().chain(after.keys()).copied().collect::<BTreeSet<&str>>() {
            let open = self.open.get(table).copied().filter(|open| open.windows > 0);
            let settings = self.settings(table);
            let (change, verdict, why) = match (before.get(table), after.get(table), open) {
                (Some(before), Some(after), _) if before == after => {
                    if settings.is_empty() {
                        continue;
                    }
                    (settings, Verdict::Safe, "open windows go on: their state is the same".to_string())
                }
                (None, _, _) => ("added".into(), Verdict::Safe, self.starts_empty()),
                (Some(_), Some(_), None) => {
                    (settings, Verdict::Safe, format!("no window is open: {}", self.starts_empty()))
                }
                (Some(_), None, None) => {
                    ("removed".into(), Verdict::Safe, "no window is open; the table stays as it is".into())
                }
                (Some(_), Some(_), Some(open)) => {
                    judged.drops.insert(table.to_string());
                    // What has been written of them is of the other mode.
                    let how = if settings == "output_mode" { "of the other mode" } else { "aggregated another way" };
                    (settings, Verdict::NeedsRebuild, format!("{} {how}", shown(open)))
                }
                (Some(_), None, Some(open)) => {
                    judged.drops.insert(table.to_string());
                    let why = format!(
                        "{} dropped and never reach the table, which stays as it is. To agree to that: floe plan FILE --apply",
                        shown(open)
                    );
                    ("removed".into(), Verdict::DropsState, why)
                }
            };
            let change = if change.is_empty() { "changed".to_string() } else { change };
            judged.list.push(Change::new(subject(table), change, verdict, why));
        }
        judged
    }

    /// Which settings of a table's windows differ.
    fn settings(&self, table: &str) -> String {
        let prefix = format!("windows.{table}.");
        let mut names: Vec<&str> = self.differences.iter().filter_map(|d| d.setting.strip_prefix(&prefix)).collect();
        if names.contains(&"size") {
            names.retain(|name| *name != "windowing");
        }
        let names: Vec<&str> = names
            .into_iter()
            .map(|name| if name == "windowing" { "slide, start or time_zone" } else { name })
            .collect();
        names.join(", ")
    }

    fn starts_empty(&self) -> String {
        let windows = match self.evict_ms {
            crate::window::UNSET_WATERMARK_MS => "its windows".to_string(),
            ms => format!("its windows that end after {}", rfc3339(ms)),
        };
        format!("{windows} have the rows of the next batch on, and none that were read before")
    }
}

/// With a verb that fits.
fn shown(open: Open) -> String {
    let Open { windows, groups } = open;
    let (windows, verb) =
        if windows == 1 { ("1 open window".to_string(), "is") } else { (format!("{windows} open windows"), "are") };
    let groups = if groups == 1 { "1 group".to_string() } else { format!("at most {groups} groups") };
    format!("{windows} with {groups} {verb}")
}

/// Where the oldest window begins that the watermark has left open.
fn oldest_open_us(query: &WindowQuery, evict_ms: i64) -> Option<i64> {
    // Nothing says how far back a session reaches.
    if evict_ms == crate::window::UNSET_WATERMARK_MS || query.windowing().is_session() {
        return None;
    }
    query.windowing().covering(evict_ms.saturating_mul(1000)).starts.last().copied()
}

fn advise_rebuild(change: &mut Change, logs: &[(MicroBatch, CommitEntry)], from_us: Option<i64>) {
    let offsets = from_us.map(|from_us| needed_from(logs, from_us)).unwrap_or_default();
    let mut by_topic: BTreeMap<String, BTreeMap<String, i64>> = BTreeMap::new();
    for (tp, offset) in &offsets {
        by_topic.entry(tp.topic.to_string()).or_default().insert(tp.partition.to_string(), *offset);
    }
    let toml = match by_topic.is_empty() {
        true => "\"earliest\"".to_string(),
        false => {
            let topics = by_topic.iter().map(|(topic, partitions)| {
                let partitions: Vec<String> = partitions.iter().map(|(p, offset)| format!("{p} = {offset}")).collect();
                format!("{topic:?} = {{ {} }}", partitions.join(", "))
            });
            format!("{{ {} }}", topics.collect::<Vec<_>>().join(", "))
        }
    };
    let whole = match from_us {
        Some(us) => format!("from {} on", rfc3339(us.div_euclid(1000))),
        None => "that the topics still have all records of".to_string(),
    };
    let incomplete = match logs.last().and_then(|(_, commit)| commit.event_times.latest_ms()) {
        Some(ms) => {
            format!("those that begin by {}, the latest event time so far, lack what was read before", rfc3339(ms))
        }
        None => "no row was read before".to_string(),
    };
    change.why.push_str(&format!(
        ": a rebuild. This version does not do it in place. Undo the change; or\n               \
         - for windows that are whole {whole}: start over with a new name, checkpoint and tables from\n                 \
         source.starting_offsets = {toml}\n               \
         - to keep what is there: write the windows as they are now to another table, which starts empty\n               \
         - to go on in this table without its open windows: floe plan FILE --apply. They never reach the table, and of the \
         windows as they are now {incomplete}"
    ));
    change.starting_offsets = Some(by_topic);
}

/// From where all rows with an event time of `from_us` or later can be read: no earlier row of the partition has one. `logs`
/// are batches in a row, ending with the newest. Partitions of which the logs do not tell are left out.
fn needed_from(logs: &[(MicroBatch, CommitEntry)], from_us: i64) -> Offsets {
    let from_ms = from_us.div_euclid(1000);
    let mut needed = Offsets::new();
    let Some((newest, _)) = logs.last() else { return needed };
    for (tp, range) in &newest.ranges {
        // What is known of the time before a batch is what the commit before it says, and before the first batch there was nothing.
        let before = |index: usize| match index.checked_sub(1).and_then(|before| logs.get(before)) {
            Some((_, commit)) => Some(latest_ms(commit, tp)),
            None if index == 0 && newest_is_first(logs) => Some(None),
            None => None,
        };
        let starts = logs.iter().map(|(plan, _)| plan.ranges.get(tp).map(|range| range.start));
        let starts: Vec<Option<i64>> = starts.chain([Some(range.end)]).collect();
        let clean = (0..starts.len())
            .rev()
            .find(|index| before(*index).is_some_and(|latest| latest.is_none_or(|latest| latest < from_ms)));
        if let Some(start) = clean.and_then(|index| starts.get(index).copied().flatten()) {
            needed.insert(tp.clone(), start);
        }
    }
    needed
}

fn newest_is_first(logs: &[(MicroBatch, CommitEntry)]) -> bool {
    logs.first().is_some_and(|(plan, _)| plan.batch == 0)
}

fn latest_ms(commit: &CommitEntry, tp: &TopicPartition) -> Option<i64> {
    commit.event_times.partitions.get(tp).and_then(|time| time.max_event_time_ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{OffsetRange, Watermarks};
    use crate::checkpoint::Counts;
    use crate::window::watermark::{EventTimeProgress, PartitionTime};

    const NOTHING: &[Difference] = &[];

    fn judge(before: &[(&str, &str)], after: &[(&str, &str)], open: &[(&str, u64)]) -> Vec<(String, Verdict)> {
        let states = WindowStates::default().with(before.iter().copied());
        let open = open.iter().map(|(t, windows)| (t.to_string(), Open { windows: *windows, groups: 7 })).collect();
        let windows = Windows { before: &states, open: &open, differences: NOTHING, evict_ms: 0 };
        let judged = windows.judge_definitions(&after.iter().copied().collect());
        judged.list.into_iter().map(|c| (c.subject.replace("windows ", ""), c.verdict)).collect()
    }

    #[test]
    fn windows_come_go_and_change() {
        use Verdict::*;
        let both = [("a", "x"), ("b", "y")];
        let is = |table: &str, verdict| vec![(table.to_string(), verdict)];
        assert_eq!(judge(&both, &[("b", "y"), ("a", "x")], &[("a", 1), ("b", 1)]), []);
        assert_eq!(judge(&both[..1], &both, &[("a", 1)]), is("b", Safe));
        assert_eq!(judge(&both, &both[..1], &[("b", 3)]), is("b", DropsState));
        assert_eq!(judge(&both, &both[..1], &[("a", 3)]), is("b", Safe));
        assert_eq!(judge(&both, &[("a", "x"), ("b", "z")], &[("b", 1)]), is("b", NeedsRebuild));
        assert_eq!(judge(&both, &[("a", "x"), ("b", "z")], &[("a", 1)]), is("b", Safe));
    }

    fn log(batch: u64, start: i64, end: i64, latest_ms: Option<i64>) -> (MicroBatch, CommitEntry) {
        let tp = TopicPartition::new("t", 0);
        let plan = MicroBatch {
            batch,
            epoch: 1,
            trigger_time_ms: 0,
            config_fingerprint: String::new(),
            ranges: [(tp.clone(), OffsetRange { start, end })].into(),
            gaps: Vec::new(),
            topic_ids: BTreeMap::new(),
            watermarks: Watermarks::default(),
            left_behind: BTreeMap::new(),
            held_by: None,
            tables: BTreeMap::new(),
        };
        let time = PartitionTime { max_event_time_ms: latest_ms, active_at_ms: 0, barren_ms: None };
        let commit = CommitEntry {
            batch,
            epoch: 1,
            plan_digest: String::new(),
            watermark_next_ms: None,
            event_times: EventTimeProgress { partitions: [(tp, time)].into(), records_since_ms: 0 },
            reread: None,
            windows: WindowStates::default(),
            definition: Definition::default(),
            state: Vec::new(),
            snapshots: BTreeMap::new(),
            counts: Counts::default(),
            committed_at_ms: 0,
            dead_letter_topic: None,
        };
        (plan, commit)
    }

    #[test]
    fn rows_of_open_windows_are_needed_from_the_batch_that_may_have_the_first_of_them() {
        let from = |logs: &[_], ms: i64| needed_from(logs, ms * 1000).values().next().copied();
        let logs = [log(0, 10, 20, Some(5)), log(1, 20, 30, Some(9)), log(2, 30, 40, Some(9))];
        assert_eq!(from(&logs, 4), Some(10), "batch 0 may have it");
        assert_eq!(from(&logs, 5), Some(10));
        assert_eq!(from(&logs, 6), Some(20), "before batch 1 nothing was that late");
        assert_eq!(from(&logs, 9), Some(20));
        assert_eq!(from(&logs, 10), Some(40), "nothing that was read is needed");
        // The logs of batch 0 are gone.
        assert_eq!(from(&logs[1..], 9), None);
        assert_eq!(from(&logs[1..], 10), Some(40));
        assert_eq!(from(&[log(0, 10, 20, None)], 1), Some(20));
    }

    #[test]
    fn what_stands_against_going_on() {
        let mut changes = Changes { since: Some(3), ..Changes::default() };
        changes.list.push(Change::new("a", "b", Verdict::Safe, "c"));
        assert!(changes.check().is_ok());
        changes.list.push(Change::new("windows t", "removed", Verdict::DropsState, "gone"));
        let error = changes.check().unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains("windows t: removed"), "{error}");
        assert!(!error.to_string().contains("a: b"), "{error}");
        changes.list.push(Change::new("windows t", "size", Verdict::NeedsRebuild, "why"));
        changes.agreed = true;
        assert!(changes.check().is_ok());
        changes.list.push(Change::new("source.topics", "t removed", Verdict::Refused, "why"));
        assert!(changes.check().is_err());
    }

    #[test]
    fn settings_of_types_are_judged_like_those_of_one() {
        let of = |setting: &str| {
            let difference = Difference { setting: setting.into(), before: Some("1".into()), after: None };
            super::setting(&difference).map(|c| (c.change, c.why))
        };
        assert_eq!(of("types.reading.transform.filter"), of("transform.filter"));
        assert_eq!(of("windows.a.b.size"), None);
        let (change, why) = of("event_time.column").unwrap();
        assert_eq!(change, "1 -> not set");
        assert!(why.contains("never goes back"), "{why}");
    }
}
