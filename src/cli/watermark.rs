//! `floe watermark`: where the watermark of a pipeline is, which partition holds it there, and what it closes next.
//!
//! Owns: the explanation and its two forms, for people and as JSON. Does not own: the rules ([`crate::window::watermark`]). It
//! reads the checkpoint and nothing else, so it works while the pipeline runs and while it does not.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::{Error, beside};
use crate::batch::{MicroBatch, TopicPartition};
use crate::checkpoint::{Checkpoint, CommitEntry, LoggedPlan};
use crate::config::{Config, EventTimeConfig};
use crate::error::Error as QueryError;
use crate::pipeline::Pipeline;
use crate::query::blocking;
use crate::state::{self, Numbers, Reader, WindowQuery};
use crate::telemetry::rfc3339;
use crate::window::closed;
use crate::window::watermark::{EventTimeProgress, WatermarkPolicy, decide};

/// The explanation, for the terminal.
pub async fn watermark(config: &Config, as_json: bool) -> Result<String, Error> {
    let Some(event_time) = config.event_time.as_ref().filter(|_| !config.windows.is_empty()) else {
        return Err(Error::Other(format!("pipeline {} has no [[windows]], and so no watermark", config.name)));
    };
    let pipeline = Pipeline::compile(config).map_err(|p| QueryError::Compile(p.join("\n")))?;
    let location = crate::storage::open(&config.checkpoint_location).map_err(QueryError::from)?;
    if Checkpoint::inspect(location.clone()).await.map_err(QueryError::from)?.is_none() {
        return Err(Error::Other(format!(
            "there is no checkpoint at {} yet: the pipeline has not run, and there is no watermark",
            location.url
        )));
    }
    let checkpoint = Arc::new(Checkpoint::open(location, &config.name).await.map_err(QueryError::from)?);
    let (recovered, open) = beside::read(&checkpoint, async |recovered| {
        let Some(logged) = &recovered.plan else { return Ok(Vec::new()) };
        open_windows(&checkpoint, recovered.commit.as_ref(), &logged.plan, pipeline.queries.clone()).await
    })
    .await?;
    let Some(LoggedPlan { plan, .. }) = recovered.plan else {
        return Err(Error::Other(format!("pipeline {} has planned no batch yet: there is no watermark", config.name)));
    };
    let commit = recovered.commit;
    let now_ms = (crate::clock::system())();
    let explanation = Explanation::new(&config.name, event_time, &plan, commit.as_ref(), &open, now_ms);
    Ok(if as_json { explanation.json().to_string() } else { explanation.text() })
}

/// An open window, `[start, end)`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct OpenWindow {
    end_us: i64,
    start_us: i64,
}

/// Those of a table.
struct OpenWindows {
    table: String,
    /// Of sessions there is no more than the one that ends first.
    sessions: bool,
    windows: Vec<OpenWindow>,
}

async fn open_windows(
    checkpoint: &Arc<Checkpoint>,
    commit: Option<&CommitEntry>,
    plan: &MicroBatch,
    queries: Arc<[WindowQuery]>,
) -> Result<Vec<OpenWindows>, QueryError> {
    let none =
        |q: &WindowQuery| OpenWindows { table: q.table().to_string(), sessions: q.is_session(), windows: Vec::new() };
    let mut open: Vec<OpenWindows> = queries.iter().map(none).collect();
    let Some(commit) = commit else { return Ok(open) };
    let numbers = Numbers::of(&commit.windows, queries.iter().map(WindowQuery::table));
    let reader = Reader::new(checkpoint.clone(), Handle::current(), numbers);
    let files = reader.open(&commit.state).await?;
    let evict_ms = plan.watermarks.evict();
    for window in state::open_windows(&files, evict_ms) {
        if let Some(of) = open.get_mut(window.query).filter(|of| !of.sessions) {
            of.windows.push(OpenWindow { end_us: window.end_us, start_us: window.start_us });
        }
    }
    // When a session ends, only reading it tells.
    let first = blocking(move || Ok(state::first_sessions(&queries, &reader, &files, evict_ms)?)).await?;
    for (query, (start_us, end_us)) in first {
        if let Some(of) = open.get_mut(query) {
            of.windows.push(OpenWindow { end_us, start_us });
        }
    }
    Ok(open)
}

struct Explanation {
    pipeline: String,
    policy: WatermarkPolicy,
    delay_ms: i64,
    plan: MicroBatch,
    committed: bool,
    /// What planning now would make of it, if nothing new had come.
    next_ms: Option<i64>,
    /// Nothing came from any partition for the idle timeout.
    silent: bool,
    partitions: Vec<Partition>,
    next_windows: Vec<NextWindow>,
}

struct Partition {
    tp: TopicPartition,
    max_event_time_ms: Option<i64>,
    /// Behind the partition that is furthest ahead.
    behind_ms: Option<i64>,
    active_at_ms: i64,
    idle: bool,
    /// Offsets that the last batch left for the next ones.
    left_behind: u64,
}

struct NextWindow {
    table: String,
    session: bool,
    window: Option<OpenWindow>,
    /// The event time that closes it.
    closes_at_ms: i64,
    /// Partitions that have not reached it and are waited for; the first one furthest behind.
    waits_for: Vec<TopicPartition>,
}

impl Explanation {
    fn new(
        pipeline: &str,
        event_time: &EventTimeConfig,
        plan: &MicroBatch,
        commit: Option<&CommitEntry>,
        open: &[OpenWindows],
        now_ms: i64,
    ) -> Explanation {
        let mut plan = plan.clone();
        if event_time.policy == WatermarkPolicy::GlobalMax {
            // Of another policy, when it has been changed since.
            plan.held_by = None;
        }
        let committed = commit.is_some_and(|c| c.batch == plan.batch);
        let delay_ms = event_time.watermark_delay.as_millis() as i64;
        let progress = commit.map(|c| c.event_times.clone()).unwrap_or_default();
        // Before it is committed it is unknown what a batch has found; until then its own backlog counts.
        let waiting = |tp: &TopicPartition| {
            let unread = plan.ranges.get(tp).filter(|_| !committed).map_or(0, |range| range.len());
            unread + plan.left_behind.get(tp).copied().unwrap_or(0)
        };
        let backlog: BTreeMap<_, _> = plan.ranges.keys().map(|tp| (tp.clone(), waiting(tp) > 0)).collect();
        let at_least = match commit {
            Some(commit) if committed => commit.watermark_next_ms,
            _ => plan.watermarks.evict_ms,
        };
        let decision = decide(event_time.policy, delay_ms, at_least, &progress, now_ms, &backlog);
        let partitions = partitions(event_time.policy, &plan, &progress, now_ms, waiting);
        let next_windows = open
            .iter()
            .map(|OpenWindows { table, sessions, windows }| {
                let window = windows.iter().min().cloned();
                let end_ms = window.as_ref().map_or(0, |w| w.end_us.div_euclid(1000) + i64::from(w.end_us % 1000 != 0));
                let closes_at_ms = end_ms.saturating_add(delay_ms);
                let mut waits_for: Vec<&Partition> = partitions
                    .iter()
                    .filter(|p| !p.idle && p.max_event_time_ms.is_none_or(|max| max < closes_at_ms))
                    .collect();
                waits_for.sort_by_key(|p| p.max_event_time_ms);
                let waits_for = waits_for.into_iter().map(|p| p.tp.clone()).collect();
                NextWindow { table: table.clone(), session: *sessions, window, closes_at_ms, waits_for }
            })
            .collect();
        Explanation {
            pipeline: pipeline.to_string(),
            policy: event_time.policy,
            delay_ms,
            plan,
            committed,
            next_ms: decision.watermark_ms,
            silent: progress.is_silent(now_ms, event_time.policy.idle_timeout_ms()),
            partitions,
            next_windows,
        }
    }

    fn holds(&self, tp: &TopicPartition) -> bool {
        self.plan.held_by.as_ref().is_some_and(|h| h.topic == *tp.topic && h.partition == tp.partition)
    }

    fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Explanation { pipeline, plan, .. } = self;
        let watermark = plan.watermarks.evict_ms.map_or("not set yet".to_string(), rfc3339);
        let state = if self.committed { "" } else { ", which is in hand or waits to be repeated" };
        let planned = rfc3339(plan.trigger_time_ms);
        writeln!(out, "{pipeline}: watermark {watermark} in batch {} of {planned}{state}", plan.batch)?;
        let delay = duration(self.delay_ms);
        match self.policy {
            WatermarkPolicy::GlobalMax => {
                writeln!(out, "policy global-max: the latest event time of all, less {delay}")?
            }
            WatermarkPolicy::PartitionMin { idle_timeout_ms } => writeln!(
                out,
                "policy partition-min: the least over the partitions of the latest event time of each, less {delay}; a \
                 partition without one for {} is idle and does not count",
                duration(idle_timeout_ms)
            )?,
        }
        if let Some(held) = &plan.held_by {
            let (batch, since) = (held.since_batch, rfc3339(held.since_ms));
            writeln!(out, "held back by {}-{} since batch {batch} of {since}", held.topic, held.partition)?;
        }
        if self.silent {
            writeln!(out, "no partition has had a row lately: nothing moves until there are some again")?;
        } else if self.next_ms > plan.watermarks.evict_ms {
            let next = self.next_ms.map(rfc3339).unwrap_or_default();
            writeln!(out, "the next batch moves it to {next}, unless another partition has records by then")?;
        }

        let mut rows = vec![["partition", "latest event time", "behind", ""].map(String::from)];
        for p in &self.partitions {
            let mut notes = Vec::new();
            if self.holds(&p.tp) {
                notes.push("holds the watermark back".to_string());
            }
            if p.idle {
                notes.push(format!("idle, last active {}", rfc3339(p.active_at_ms)));
            }
            if p.left_behind > 0 {
                notes.push(format!("{} offsets still to read", p.left_behind));
            }
            rows.push([
                p.tp.to_string(),
                p.max_event_time_ms.map_or("none yet".to_string(), rfc3339),
                p.behind_ms.filter(|ms| *ms > 0).map(duration).unwrap_or_default(),
                notes.join("; "),
            ]);
        }
        let width = |column: usize| rows.iter().map(|r| r[column].len()).max().unwrap_or(0);
        let (a, b, c) = (width(0), width(1), width(2));
        writeln!(out)?;
        for [partition, latest, behind, notes] in &rows {
            writeln!(out, "{}", format!("{partition:a$}  {latest:b$}  {behind:>c$}  {notes}").trim_end())?;
        }

        writeln!(out, "\nnext to close")?;
        for next in &self.next_windows {
            let Some(window) = &next.window else {
                writeln!(out, "{}: no window is open", next.table)?;
                continue;
            };
            let (start, end) = (rfc3339(window.start_us.div_euclid(1000)), rfc3339(window.end_us.div_euclid(1000)));
            let (what, unless) =
                if next.session { ("the session ", ", unless it goes on until then") } else { ("", "") };
            writeln!(out, "{}: {what}[{start}, {end}), {}{unless}", next.table, self.when(next))?;
        }
        Ok(())
    }

    fn when(&self, next: &NextWindow) -> String {
        let at = rfc3339(next.closes_at_ms);
        if closed(next.window.as_ref().map_or(i64::MAX, |w| w.end_us), self.next_ms.unwrap_or(i64::MIN)) {
            return "with the next batch".into();
        }
        match (self.policy, next.waits_for.as_slice()) {
            (WatermarkPolicy::GlobalMax, _) => format!("when any partition has an event time of {at} or later"),
            (_, []) => format!(
                "once there are records again: with an event time of {at} or later on each partition that has them"
            ),
            (_, [one]) => format!("when {one} has an event time of {at} or later"),
            (_, [first, rest @ ..]) => {
                let others = if rest.len() == 1 { "another partition" } else { "other partitions" };
                let count = if rest.len() == 1 { String::new() } else { format!("{} ", rest.len()) };
                format!("when {first} and {count}{others} have an event time of {at} or later")
            }
        }
    }

    fn json(&self) -> Value {
        let time = |ms: Option<i64>| ms.map(rfc3339);
        let partitions: Vec<Value> = self
            .partitions
            .iter()
            .map(|p| {
                json!({
                    "topic": &*p.tp.topic, "partition": p.tp.partition, "latest_event_time": time(p.max_event_time_ms),
                    "behind_ms": p.behind_ms, "last_active": rfc3339(p.active_at_ms), "idle": p.idle,
                    "offsets_still_to_read": p.left_behind, "holds_back": self.holds(&p.tp),
                })
            })
            .collect();
        let windows: Vec<Value> = self
            .next_windows
            .iter()
            .map(|next| {
                json!({
                    "table": next.table,
                    "window_start": next.window.as_ref().map(|w| rfc3339(w.start_us.div_euclid(1000))),
                    "window_end": next.window.as_ref().map(|w| rfc3339(w.end_us.div_euclid(1000))),
                    "closes_at_event_time": next.window.as_ref().map(|_| rfc3339(next.closes_at_ms)),
                    "waits_for": next.waits_for.iter().map(|tp| json!({"topic": &*tp.topic, "partition": tp.partition}))
                        .collect::<Vec<_>>(),
                })
            })
            .collect();
        let idle_timeout_ms = match self.policy {
            WatermarkPolicy::GlobalMax => None,
            WatermarkPolicy::PartitionMin { idle_timeout_ms } => Some(idle_timeout_ms),
        };
        json!({
            "pipeline": self.pipeline, "policy": self.policy.name(), "watermark_delay_ms": self.delay_ms,
            "idle_timeout_ms": idle_timeout_ms, "batch": self.plan.batch, "committed": self.committed,
            "planned": rfc3339(self.plan.trigger_time_ms), "watermark": time(self.plan.watermarks.evict_ms),
            "next_watermark": time(self.next_ms),
            "held_by": self.plan.held_by.as_ref().map(|held| json!({
                "topic": held.topic, "partition": held.partition, "since_batch": held.since_batch,
                "since": rfc3339(held.since_ms),
            })),
            "partitions": partitions, "next_windows": windows,
        })
    }
}

fn partitions(
    policy: WatermarkPolicy,
    plan: &MicroBatch,
    progress: &EventTimeProgress,
    now_ms: i64,
    waiting: impl Fn(&TopicPartition) -> u64,
) -> Vec<Partition> {
    let furthest = progress.partitions.values().filter_map(|time| time.max_event_time_ms).max();
    let partition = |tp: &TopicPartition| {
        let time = progress.partitions.get(tp);
        let max_event_time_ms = time.and_then(|time| time.max_event_time_ms);
        let idle = match (policy, time) {
            (WatermarkPolicy::PartitionMin { idle_timeout_ms }, Some(_)) => {
                progress.is_idle(tp, now_ms, waiting(tp) > 0, idle_timeout_ms)
            }
            _ => false,
        };
        Partition {
            tp: tp.clone(),
            max_event_time_ms,
            behind_ms: furthest.zip(max_event_time_ms).map(|(furthest, own)| furthest.saturating_sub(own)),
            active_at_ms: time.map_or(plan.trigger_time_ms, |time| time.active_at_ms),
            idle,
            left_behind: waiting(tp),
        }
    };
    plan.ranges.keys().map(partition).collect()
}

/// `58m 20s`
fn duration(ms: i64) -> String {
    format!("{:#}", jiff::SignedDuration::from_millis(ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{OffsetRange, Watermarks};
    use crate::checkpoint::Counts;
    use crate::window::watermark::{HeldBy, PartitionTime};
    use std::time::Duration;

    const NOON_MS: i64 = 1_772_366_400_000;

    fn tp(partition: i32) -> TopicPartition {
        TopicPartition::new("telemetry", partition)
    }

    fn event_time(policy: WatermarkPolicy) -> EventTimeConfig {
        let watermark_delay = Duration::from_secs(600);
        EventTimeConfig { column: "at".into(), watermark_delay, policy, max_future: None }
    }

    fn plan(evict_ms: Option<i64>) -> MicroBatch {
        MicroBatch {
            batch: 41,
            epoch: 1,
            trigger_time_ms: NOON_MS,
            config_fingerprint: String::new(),
            ranges: (0..3).map(|p| (tp(p), OffsetRange { start: 0, end: 10 })).collect(),
            gaps: Vec::new(),
            topic_ids: BTreeMap::new(),
            watermarks: Watermarks { late_ms: None, evict_ms },
            left_behind: [(tp(1), 500)].into(),
            held_by: Some(HeldBy {
                topic: "telemetry".into(),
                partition: 1,
                since_batch: 37,
                since_ms: NOON_MS - 40_000,
            }),
            tables: BTreeMap::new(),
        }
    }

    fn commit(batch: u64, watermark_next_ms: Option<i64>) -> CommitEntry {
        let time = |max_event_time_ms, active_at_ms| PartitionTime { max_event_time_ms, active_at_ms, barren_ms: None };
        CommitEntry {
            batch,
            epoch: 1,
            plan_digest: String::new(),
            watermark_next_ms,
            event_times: EventTimeProgress {
                records_since_ms: 0,
                partitions: [
                    (tp(0), time(Some(NOON_MS), NOON_MS)),
                    (tp(1), time(Some(NOON_MS - 3_500_000), NOON_MS)),
                    (tp(2), time(None, NOON_MS - 300_000)),
                ]
                .into(),
            },
            reread: None,
            windows: Default::default(),
            definition: Default::default(),
            state: Vec::new(),
            snapshots: BTreeMap::new(),
            counts: Counts::default(),
            committed_at_ms: NOON_MS,
            dead_letter_topic: None,
        }
    }

    fn open() -> Vec<OpenWindows> {
        let window = |start_ms: i64| OpenWindow { start_us: start_ms * 1000, end_us: (start_ms + 60_000) * 1000 };
        let minutes = [0, 1, 60].map(|minute| window(NOON_MS - 4_080_000 + minute * 60_000)).to_vec();
        let of = |table: &str, sessions, windows| OpenWindows { table: table.into(), sessions, windows };
        vec![
            of("t.minutes", false, minutes),
            of("t.hours", false, Vec::new()),
            of("t.sessions", true, vec![window(NOON_MS - 4_080_000)]),
        ]
    }

    #[test]
    fn says_which_partition_holds_it_and_what_closes_next() {
        let policy = WatermarkPolicy::PartitionMin { idle_timeout_ms: 300_000 };
        let watermark = NOON_MS - 4_100_000;
        let (plan, commit) = (plan(Some(watermark)), commit(41, Some(watermark)));
        let shown = Explanation::new("p", &event_time(policy), &plan, Some(&commit), &open(), NOON_MS + 1_000);
        let expected = [
            "p: watermark 2026-03-01T10:51:40Z in batch 41 of 2026-03-01T12:00:00Z",
            "policy partition-min: the least over the partitions of the latest event time of each, less 10m; a partition \
             without one for 5m is idle and does not count",
            "held back by telemetry-1 since batch 37 of 2026-03-01T11:59:20Z",
            "",
            "partition    latest event time      behind",
            "telemetry-0  2026-03-01T12:00:00Z",
            "telemetry-1  2026-03-01T11:01:40Z  58m 20s  holds the watermark back; 500 offsets still to read",
            "telemetry-2  none yet                       idle, last active 2026-03-01T11:55:00Z",
            "",
            "next to close",
            "t.minutes: [2026-03-01T10:52:00Z, 2026-03-01T10:53:00Z), when telemetry-1 has an event time of \
             2026-03-01T11:03:00Z or later",
            "t.hours: no window is open",
            "t.sessions: the session [2026-03-01T10:52:00Z, 2026-03-01T10:53:00Z), when telemetry-1 has an event time of \
             2026-03-01T11:03:00Z or later, unless it goes on until then",
        ];
        assert_eq!(shown.text().lines().collect::<Vec<_>>(), expected);
        let json = shown.json();
        assert_eq!(json["held_by"]["since_batch"], 37);
        assert_eq!(json["partitions"][1]["behind_ms"], 3_500_000);
        assert_eq!(json["partitions"][2]["idle"], true);
        assert_eq!(json["next_windows"][0]["waits_for"], json!([{"topic": "telemetry", "partition": 1}]));
        assert_eq!(json["next_windows"][1]["window_end"], Value::Null);
    }

    #[test]
    fn a_batch_in_hand_and_silence_everywhere() {
        let policy = WatermarkPolicy::PartitionMin { idle_timeout_ms: 300_000 };
        let before = commit(40, None);
        let shown = Explanation::new("p", &event_time(policy), &plan(None), Some(&before), &open(), NOON_MS + 1_000);
        let text = shown.text();
        assert!(
            text.starts_with("p: watermark not set yet in batch 41 of 2026-03-01T12:00:00Z, which is in hand"),
            "{text}"
        );
        assert!(text.contains("510 offsets still to read"), "{text}");

        let mut quiet = plan(Some(NOON_MS - 4_100_000));
        (quiet.left_behind, quiet.held_by) = (BTreeMap::new(), None);
        let done = commit(41, quiet.watermarks.evict_ms);
        let shown = Explanation::new("p", &event_time(policy), &quiet, Some(&done), &open(), NOON_MS + 600_000);
        let text = shown.text();
        assert!(text.contains("no partition has had a row lately"), "{text}");
        assert!(text.contains("when telemetry-1 has"), "{text}");
    }

    #[test]
    fn global_max_goes_by_whoever_is_furthest() {
        let watermark = NOON_MS - 4_050_000;
        let (plan, commit) = (plan(Some(watermark)), commit(41, Some(watermark)));
        let event_time = event_time(WatermarkPolicy::GlobalMax);
        let text = Explanation::new("p", &event_time, &plan, Some(&commit), &open(), NOON_MS).text();
        assert!(text.contains("policy global-max: the latest event time of all, less 10m"), "{text}");
        assert!(text.contains("when any partition has an event time of 2026-03-01T11:03:00Z or later"), "{text}");
    }
}
