//! Records from Kafka. With [`crate::sink::kafka`], which writes dead letters, the only user of librdkafka.
//!
//! Owns: two clients. One reads, on a thread of its own ([`reader`]), because librdkafka blocks and because its position
//! is worth keeping from batch to batch; partitions are assigned, never subscribed to, so no rebalance can take them
//! away. The other one plans and reports, because on the reading client each question would queue behind a long poll.
//! Does not own: progress. The checkpoint says where a batch starts; the consumer group only shows lag tools where it is.

mod admin;
mod health;
mod native;
mod reader;
mod settings;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::types::RDKafkaErrorCode as Code;

use self::admin::{Failure, Listed, Spec};
use self::health::Health;
use self::native::{Client, Wake};
use self::reader::{Outlet, Read, Reader};
use super::{Available, Chunks, Error, Source};
use crate::batch::{OffsetRange, Offsets, Ranges, TopicPartition};
use crate::config::SourceConfig;

/// How long the brokers may take to answer one planning question.
const PLANNING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a topic may be unknown before it counts as gone: metadata reaches brokers one after the other.
const TOPIC_PATIENCE: Duration = Duration::from_secs(2);
/// How long dropping the source may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How a query is called on the brokers, unless the user's own settings say otherwise.
#[derive(Clone, Debug)]
pub struct QueryNames {
    pub client_id: String,
    pub group_id: String,
}

impl QueryNames {
    pub fn of(pipeline: &str) -> QueryNames {
        let name = format!("floe-{pipeline}");
        QueryNames { client_id: name.clone(), group_id: name }
    }
}

/// Big enough to amortise what a chunk costs, small enough to be shared out over workers.
#[derive(Clone, Copy, Debug)]
pub struct ChunkSettings {
    pub target_bytes: usize,
    pub max_records: usize,
    /// Everything held here: librdkafka's queues and chunks that nobody has taken yet.
    pub buffer_bytes: u64,
}

impl Default for ChunkSettings {
    fn default() -> Self {
        ChunkSettings { target_bytes: 1 << 20, max_records: 16_384, buffer_bytes: 128 << 20 }
    }
}

impl ChunkSettings {
    pub fn with_buffer(buffer_bytes: u64) -> Self {
        ChunkSettings { buffer_bytes, ..ChunkSettings::default() }
    }

    /// Chunks that may wait to be taken: a quarter of the budget. Another quarter is for chunks being filled.
    fn waiting(&self) -> usize {
        (self.buffer_bytes as usize / 4 / self.target_bytes.max(1)).clamp(2, 64)
    }

    fn for_lanes(&self, lanes: usize) -> Self {
        let fair = self.buffer_bytes as usize / 4 / lanes.max(1);
        ChunkSettings { target_bytes: self.target_bytes.min(fair.max(16 << 10)), ..*self }
    }
}

pub struct KafkaSource {
    topics: Vec<String>,
    brokers: String,
    chunks: ChunkSettings,
    committed_only: bool,
    settings: ClientConfig,
    planner: Client,
    /// Topics that have been there: if one is missing now, it was deleted.
    seen: BTreeSet<String>,
    wake: Arc<Wake>,
    reader: Option<(Sender<Read>, JoinHandle<()>)>,
}

impl KafkaSource {
    /// Checks the settings and connects in the background; brokers that are away show in [`Source::available`].
    pub fn new(config: &SourceConfig, names: QueryNames, chunks: ChunkSettings) -> Result<KafkaSource, Error> {
        let settings = settings::planner(config, &names);
        let planner = Client::new(&settings, Arc::new(Health::default()))
            .map_err(|reason| Error::Fatal { message: format!("source.kafka: librdkafka refuses {reason}") })?;
        let topics: BTreeSet<String> = config.topics.iter().cloned().collect();
        Ok(KafkaSource {
            topics: topics.into_iter().collect(),
            brokers: config.bootstrap_servers.clone(),
            chunks,
            committed_only: settings::reads_committed(&settings),
            settings,
            planner,
            seen: BTreeSet::new(),
            wake: Arc::default(),
            reader: None,
        })
    }

    /// All partitions of the topics, and the topics' ids.
    fn topics(&mut self) -> Result<Vec<admin::Topic>, Error> {
        let patience = Instant::now() + TOPIC_PATIENCE;
        loop {
            let topics = admin::describe_topics(&self.planner, &self.topics, PLANNING_TIMEOUT)
                .map_err(|failure| self.error("describing topics", failure))?;
            self.planner.health.ok();
            let Some(bad) = topics.iter().find(|t| t.error != Code::NoError || t.partitions.is_empty()) else {
                self.seen.extend(topics.iter().map(|t| t.name.clone()));
                return Ok(topics);
            };
            let (name, brokers) = (&bad.name, &self.brokers);
            match bad.error {
                Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownTopicId => {
                    if Instant::now() < patience {
                        thread::sleep(Duration::from_millis(200));
                        continue;
                    }
                    let message = if self.seen.contains(name) {
                        format!("topic {name} was deleted on {brokers} while the pipeline was running")
                    } else {
                        format!("topic {name} does not exist on {brokers}: create it or correct source.topics")
                    };
                    return Err(Error::Fatal { message });
                }
                Code::InvalidTopic => {
                    let message = format!("source.topics: Kafka does not allow a topic to be called {name:?}");
                    return Err(Error::Fatal { message });
                }
                Code::TopicAuthorizationFailed => return Err(unauthorised(name, brokers)),
                error => {
                    return Err(Error::Transient { message: format!("topic {name} on {brokers}: {error}") });
                }
            }
        }
    }

    fn list<const N: usize>(&self, partitions: &[TopicPartition], specs: [Spec; N]) -> Result<[Vec<Listed>; N], Error> {
        let answers = admin::list_offsets(&self.planner, partitions, specs, self.committed_only, PLANNING_TIMEOUT)
            .map_err(|failure| self.error("listing offsets", failure))?;
        match answers.iter().flatten().find(|l| l.error != Code::NoError) {
            Some(Listed { partition, error: Code::TopicAuthorizationFailed, .. }) => {
                Err(unauthorised(&partition.topic, &self.brokers))
            }
            Some(Listed { partition, error, .. }) => Err(Error::Transient {
                message: format!("listing offsets of {partition} on {}: {error}", self.brokers),
            }),
            None if answers.iter().any(|a| a.len() != partitions.len()) => Err(Error::Transient {
                message: format!("listing offsets on {}: the answer leaves out partitions", self.brokers),
            }),
            None => Ok(answers),
        }
    }

    /// Why records within a topic's offsets may be missing: compaction removes those that a later one of the same key replaces.
    pub fn compaction(&self) -> Result<Option<String>, Error> {
        let settings = admin::topic_setting(&self.planner, &self.topics, "cleanup.policy", PLANNING_TIMEOUT)
            .map_err(|failure| self.error("describing settings of topics", failure))?;
        Ok(settings.into_iter().find_map(|admin::Setting { topic, value }| match value {
            Ok(policy) if !policy.contains("compact") => None,
            Ok(policy) => {
                Some(format!("topic {topic} is compacted (cleanup.policy = {policy}): records may be gone from it"))
            }
            Err(error) => Some(format!(
                "whether topic {topic} is compacted cannot be asked ({error}; the permission to ask is DescribeConfigs)"
            )),
        }))
    }

    fn error(&self, action: &str, failure: Failure) -> Error {
        let brokers = &self.brokers;
        match failure {
            Failure::Refused(reason) => refused(brokers, &reason),
            Failure::Failed(reason) => {
                let last = self.planner.health.last_reason().map_or(String::new(), |r| format!("; last error: {r}"));
                Error::Transient { message: format!("{action} on {brokers}: {reason}{last}") }
            }
        }
    }

    fn start_reader(&self) -> Result<(Sender<Read>, JoinHandle<()>), Error> {
        let (sender, commands) = channel();
        let reader = Reader::new(
            commands,
            self.wake.clone(),
            self.settings.clone(),
            self.chunks,
            self.planner.health.clone(),
            self.brokers.clone(),
        );
        let thread = thread::Builder::new()
            .name("kafka-reader".into())
            .spawn(move || reader.run())
            .map_err(|e| Error::Transient { message: format!("cannot start the reading thread: {e}") })?;
        Ok((sender, thread))
    }
}

impl Source for KafkaSource {
    fn available(&mut self) -> Result<Available, Error> {
        let topics = self.topics()?;
        let partitions = partitions(&topics);
        let [earliest, latest] = self.list(&partitions, [Spec::Earliest, Spec::Latest])?;
        let latest: Offsets = latest.into_iter().map(|l| (l.partition, l.offset)).collect();
        let partitions = earliest
            .into_iter()
            .filter_map(|l| {
                // Asked at the same moment, not in one: deletion may have moved the start in between.
                let end = latest.get(&l.partition)?.max(&l.offset);
                Some((l.partition, OffsetRange { start: l.offset, end: *end }))
            })
            .collect();
        let topic_ids = topics.into_iter().filter_map(|t| Some((t.name, t.id?))).collect();
        Ok(Available { partitions, topic_ids })
    }

    fn offsets_at(&mut self, timestamp_ms: i64) -> Result<Offsets, Error> {
        let topics = self.topics()?;
        let partitions = partitions(&topics);
        let [at, latest] = self.list(&partitions, [Spec::AtTime(timestamp_ms), Spec::Latest])?;
        let mut offsets: Offsets = latest.into_iter().map(|l| (l.partition, l.offset)).collect();
        offsets.extend(at.into_iter().filter(|l| l.offset >= 0).map(|l| (l.partition, l.offset)));
        Ok(offsets)
    }

    fn read(&mut self, ranges: &Ranges) -> Result<Chunks, Error> {
        let (chunks, receiver) = sync_channel(self.chunks.waiting());
        let mut read = Read { ranges: ranges.clone(), outlet: Outlet::new(chunks) };
        // The thread ends only with the source, or by a bug of ours: then a new one takes over.
        if let Some((sender, _)) = &self.reader {
            match sender.send(read) {
                Ok(()) => {
                    self.wake.wake();
                    return Ok(receiver);
                }
                Err(e) => read = e.0,
            }
        }
        let (sender, thread) = self.start_reader()?;
        if sender.send(read).is_err() {
            return Err(Error::Transient { message: "the reading thread has ended".into() });
        }
        self.reader = Some((sender, thread));
        Ok(receiver)
    }

    fn report(&mut self, offsets: &Offsets) {
        self.planner.serve();
        if offsets.is_empty() {
            return;
        }
        let list = admin::offset_list(offsets.iter().map(|(p, &offset)| (p, offset)));
        self.planner.health.commits.fetch_add(1, Ordering::Relaxed);
        if let Err(code) = self.planner.commit(&list) {
            self.planner.health.committed(Some(&code.to_string()));
        }
    }
}

impl Drop for KafkaSource {
    fn drop(&mut self) {
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        if let Some((sender, thread)) = self.reader.take() {
            drop(sender);
            self.wake.wake();
            while !thread.is_finished() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(2));
            }
        }
        // A process that has drained its topics ends right after its last report: let that one arrive.
        let healthy = self.planner.health.last_reason().is_none();
        let deadline = Instant::now() + Duration::from_millis(500);
        while healthy && self.planner.health.commits.load(Ordering::Relaxed) > 0 && Instant::now() < deadline {
            self.planner.serve();
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn partitions(topics: &[admin::Topic]) -> Vec<TopicPartition> {
    let mut all = Vec::new();
    for topic in topics {
        let name: Arc<str> = topic.name.as_str().into();
        all.extend(topic.partitions.iter().map(|&p| TopicPartition::new(name.clone(), p)));
    }
    all
}

fn refused(brokers: &str, reason: &str) -> Error {
    Error::Fatal { message: format!("the brokers at {brokers} refuse the credentials in source.kafka: {reason}") }
}

fn unauthorised(topic: &str, brokers: &str) -> Error {
    Error::Fatal { message: format!("not allowed to read topic {topic} on {brokers}: grant Describe and Read on it") }
}
