//! The thread that reads: one batch's ranges after the other, from an assignment that lives across batches.
//!
//! Each partition has a queue of its own in librdkafka, bounded in bytes. A partition that has reached the end of its
//! range is left alone until the next batch: what was read ahead stays in its queue, neither lost nor in the way of
//! others. A range ends at the first of: a record at or beyond its last offset; the end of the partition, reported by
//! the broker at or beyond the range's end; a position beyond it. The last offset itself may never come: control records,
//! aborted transactions and compaction leave holes.
//!
//! Invariants: a batch that starts where the last one ended costs no seek; any other start, and anything that went
//! wrong, gets a new client, so that no record of an earlier position can slip in. A channel that closes without an error
//! has carried everything.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::types::RDKafkaErrorCode as Code;

use super::admin::{self, Spec};
use super::health::Health;
use super::native::{Client, Event, PartitionQueue, Wake};
use super::{ChunkSettings, refused, settings, unauthorised};
use crate::batch::{OffsetRange, Ranges, TopicPartition};
use crate::source::{Chunk, Error};

/// How often librdkafka's callbacks are served and positions looked at.
const HOUSEKEEPING: Duration = Duration::from_millis(50);
const QUESTION_TIMEOUT: Duration = Duration::from_secs(5);
/// After so long without a record librdkafka, which waits for deleted topics to come back, is asked whether they exist.
const STARVED: Duration = Duration::from_secs(3);
const EXISTS_TIMEOUT: Duration = Duration::from_secs(1);

pub struct Read {
    pub ranges: Ranges,
    pub outlet: Outlet,
}

/// The sending end of a batch. Dropped before it was finished, by a panic or by the next command, it says so.
pub struct Outlet {
    sender: SyncSender<Result<Chunk, Error>>,
    finished: bool,
}

impl Outlet {
    pub fn new(sender: SyncSender<Result<Chunk, Error>>) -> Outlet {
        Outlet { sender, finished: false }
    }

    fn finish(mut self, result: Result<(), Error>) {
        self.finished = true;
        if let Err(error) = result {
            // Nobody listens any more: then nobody wants to know.
            let _ = self.sender.send(Err(error));
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.sender.send(Err(Error::Transient { message: "reading was broken off".into() }));
        }
    }
}

/// Why a read ended before its end.
enum Stop {
    Failed(Error),
    /// The receiver is gone, another batch is asked for, or the source is being dropped.
    Cancelled,
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Failed(error)
    }
}

pub struct Reader {
    commands: Receiver<Read>,
    /// A command that came in the middle of a read.
    next: Option<Read>,
    closed: bool,
    wake: Arc<Wake>,
    settings: ClientConfig,
    chunks: ChunkSettings,
    health: Arc<Health>,
    brokers: String,
    assigned: Option<Assigned>,
}

/// A client and what it reads.
struct Assigned {
    // Dropped before the client.
    slots: Vec<Slot>,
    index: BTreeMap<TopicPartition, usize>,
    client: Arc<Client>,
}

struct Slot {
    partition: TopicPartition,
    queue: PartitionQueue,
    /// Everything below has been handed out.
    next: i64,
    /// Where the broker last reported the end of the partition, or -1.
    ended_at: i64,
}

/// One partition's part of the batch being read.
struct Lane {
    lane: usize,
    slot: usize,
    end: i64,
    done: bool,
    sequence: u64,
    chunk: Chunk,
}

impl Reader {
    pub fn new(
        commands: Receiver<Read>,
        wake: Arc<Wake>,
        settings: ClientConfig,
        chunks: ChunkSettings,
        health: Arc<Health>,
        brokers: String,
    ) -> Reader {
        Reader { commands, next: None, closed: false, wake, settings, chunks, health, brokers, assigned: None }
    }

    pub fn run(mut self) {
        while !self.closed {
            let read = match self.next.take() {
                Some(read) => read,
                None => match self.commands.recv_timeout(HOUSEKEEPING) {
                    Ok(read) => read,
                    Err(RecvTimeoutError::Timeout) => {
                        self.serve();
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                },
            };
            let Read { ranges, outlet } = read;
            match self.read(&ranges, &outlet) {
                Ok(()) => outlet.finish(Ok(())),
                Err(stop) => {
                    self.retire();
                    match stop {
                        Stop::Failed(error) => outlet.finish(Err(error)),
                        Stop::Cancelled => drop(outlet),
                    }
                }
            }
        }
    }

    fn read(&mut self, ranges: &Ranges, outlet: &Outlet) -> Result<(), Stop> {
        let mut lanes = self.align(ranges)?;
        let chunks = self.chunks.for_lanes(lanes.len());
        let mut ready = Vec::new();
        let mut housekeeping = Instant::now();
        let mut starved = Instant::now();
        loop {
            let mut progress = false;
            for lane in &mut lanes {
                let Some(assigned) = &mut self.assigned else { return Err(Stop::Cancelled) };
                match lane.pull(&mut assigned.slots[lane.slot], &chunks, &mut ready) {
                    Ok(moved) => progress |= moved,
                    Err((code, reason)) => self.partition_error(lane.slot, code, &reason)?,
                }
                for chunk in ready.drain(..) {
                    self.send(outlet, chunk)?;
                }
            }
            lanes.retain(|lane| !lane.done);
            if progress {
                self.health.ok();
                starved = Instant::now();
            }
            if lanes.is_empty() {
                return Ok(());
            }
            if self.interrupted() {
                return Err(Stop::Cancelled);
            }
            if housekeeping.elapsed() >= HOUSEKEEPING {
                housekeeping = Instant::now();
                self.serve();
                if let Some(reason) = self.health.refused() {
                    return Err(refused(&self.brokers, &reason).into());
                }
                if !progress {
                    self.pass_holes(&lanes);
                    if starved.elapsed() >= STARVED {
                        self.check_existence(&lanes)?;
                        starved = Instant::now();
                    }
                }
            }
            if !progress {
                self.wake.wait(HOUSEKEEPING);
            }
        }
    }

    /// Makes the assignment deliver every range from its start, and says what there is to read.
    fn align(&mut self, ranges: &Ranges) -> Result<Vec<Lane>, Error> {
        let elsewhere = |assigned: &Assigned| {
            ranges.iter().any(|(p, r)| assigned.index.get(p).is_some_and(|&i| assigned.slots[i].next != r.start))
        };
        if self.assigned.as_ref().is_some_and(elsewhere) {
            self.retire();
        }
        let assigned = match &mut self.assigned {
            Some(assigned) => assigned,
            None => {
                let settings = settings::reader(&self.settings, &self.chunks, ranges.len());
                let client = Client::new(&settings, self.health.clone())
                    .map_err(|reason| Error::Transient { message: format!("cannot start a Kafka client: {reason}") })?;
                self.assigned.insert(Assigned { slots: Vec::new(), index: BTreeMap::new(), client: Arc::new(client) })
            }
        };
        assigned.add(ranges, &self.wake)?;
        let mut lanes = Vec::new();
        for (lane, (partition, range)) in ranges.iter().enumerate() {
            if let (false, Some(&slot)) = (range.is_empty(), assigned.index.get(partition)) {
                let chunk = new_chunk(lane, 0, partition);
                lanes.push(Lane { lane, slot, end: range.end, done: false, sequence: 0, chunk });
            }
        }
        Ok(lanes)
    }

    /// Waits for room, with an eye on commands.
    fn send(&mut self, outlet: &Outlet, mut chunk: Chunk) -> Result<(), Stop> {
        loop {
            match outlet.sender.try_send(Ok(chunk)) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Full(Ok(back))) => chunk = back,
                Err(_) => return Err(Stop::Cancelled),
            }
            if self.interrupted() {
                return Err(Stop::Cancelled);
            }
            self.serve();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn interrupted(&mut self) -> bool {
        match self.commands.try_recv() {
            Ok(read) => {
                self.next = Some(read);
                true
            }
            Err(TryRecvError::Empty) => false,
            Err(TryRecvError::Disconnected) => {
                self.closed = true;
                true
            }
        }
    }

    fn serve(&self) {
        if let Some(assigned) = &self.assigned {
            assigned.client.serve();
        }
    }

    /// Lanes whose range ends in records that are not handed out (aborted, control) while more of the same keeps coming,
    /// so that the partition's end is never reported: the position has passed them.
    fn pass_holes(&mut self, lanes: &[Lane]) {
        let Some(assigned) = &mut self.assigned else { return };
        for lane in lanes {
            let slot = &mut assigned.slots[lane.slot];
            // Only with nothing left here does the position stand for what has been handed out.
            if slot.queue.fill() {
                continue;
            }
            let position = assigned.client.position(&slot.partition.topic, slot.partition.partition);
            // An end-of-partition event counts as a record in librdkafka's position: one that is one too far.
            if position.is_some_and(|p| p >= lane.end && p > slot.ended_at + 1) {
                slot.next = lane.end;
            }
        }
    }

    fn partition_error(&mut self, slot: usize, code: Code, reason: &str) -> Result<(), Error> {
        let Some(assigned) = &mut self.assigned else { return Ok(()) };
        let slot = &mut assigned.slots[slot];
        let partition = slot.partition.clone();
        let transient = Error::Transient { message: format!("reading {partition} on {}: {reason}", self.brokers) };
        match code {
            Code::AutoOffsetReset | Code::OffsetOutOfRange | Code::LogTruncation => {
                let (client, committed_only) = (&assigned.client, settings::reads_committed(&self.settings));
                let available = available(client, &partition, committed_only);
                Err(Error::DataLoss { wanted: slot.next, partition, available })
            }
            Code::UnknownPartition | Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownTopicId => {
                match exists(&assigned.client, &partition) {
                    Some(false) => Err(gone(&partition, &self.brokers)),
                    // A partition just added, which the client has not heard of yet.
                    Some(true) if code == Code::UnknownPartition => {
                        tracing::debug!(%partition, reason, "waiting for metadata of a new partition");
                        slot.queue.pop();
                        Ok(())
                    }
                    _ => Err(transient),
                }
            }
            Code::TopicAuthorizationFailed => Err(unauthorised(&partition.topic, &self.brokers)),
            // A damaged record among them: librdkafka would go on behind it, we must not.
            _ => Err(transient),
        }
    }

    fn check_existence(&self, lanes: &[Lane]) -> Result<(), Error> {
        let Some(assigned) = &self.assigned else { return Ok(()) };
        let mut partitions: Vec<_> = lanes.iter().map(|lane| &assigned.slots[lane.slot].partition).collect();
        partitions.dedup_by_key(|p| p.topic.clone());
        for partition in partitions {
            // Twice: a broker that has just started may not have heard of it yet.
            if exists(&assigned.client, partition) == Some(false) {
                std::thread::sleep(2 * HOUSEKEEPING);
                if exists(&assigned.client, partition) == Some(false) {
                    return Err(gone(partition, &self.brokers));
                }
            }
        }
        Ok(())
    }

    /// Lets go of the client without waiting for it.
    fn retire(&mut self) {
        if let Some(assigned) = self.assigned.take() {
            let _ = std::thread::Builder::new().name("kafka-close".into()).spawn(move || drop(assigned));
        }
    }
}

impl Assigned {
    fn add(&mut self, ranges: &Ranges, wake: &Arc<Wake>) -> Result<(), Error> {
        let new: Vec<_> = ranges.iter().filter(|(p, _)| !self.index.contains_key(p)).collect();
        if new.is_empty() {
            return Ok(());
        }
        for (partition, range) in &new {
            let queue = PartitionQueue::new(&self.client, wake, &partition.topic, partition.partition)
                .ok_or_else(|| Error::Transient { message: format!("librdkafka has no queue for {partition}") })?;
            self.index.insert((*partition).clone(), self.slots.len());
            self.slots.push(Slot { partition: (*partition).clone(), queue, next: range.start, ended_at: -1 });
        }
        let list = admin::offset_list(new.into_iter().map(|(p, r)| (p, r.start)));
        self.client
            .assign(&list)
            .map_err(|reason| Error::Transient { message: format!("assigning partitions: {reason}") })
    }
}

impl Lane {
    /// Takes what is there, up to the end of the range. True: something moved.
    fn pull(
        &mut self,
        slot: &mut Slot,
        chunks: &ChunkSettings,
        ready: &mut Vec<Chunk>,
    ) -> Result<bool, (Code, String)> {
        if slot.next >= self.end || slot.ended_at >= self.end {
            self.done = true;
        } else if !slot.queue.fill() {
            return Ok(false);
        }
        while !self.done {
            match slot.queue.peek() {
                None => break,
                Some(Event::Record(record)) => {
                    let offset = record.offset();
                    if offset >= self.end {
                        self.done = true;
                        break;
                    }
                    if offset >= slot.next {
                        let headers = record.headers();
                        self.chunk.push(offset, record.timestamp_ms(), record.key(), record.value(), headers);
                        slot.next = offset + 1;
                    }
                    self.done = slot.next >= self.end;
                    slot.queue.pop();
                    if self.chunk.data.len() >= chunks.target_bytes || self.chunk.records.len() >= chunks.max_records {
                        self.flush(slot, ready);
                    }
                }
                Some(Event::End(at)) => {
                    slot.ended_at = at;
                    self.done = at >= self.end;
                    slot.queue.pop();
                }
                Some(Event::Error(code, reason)) => return Err((code, reason)),
            }
        }
        if self.done {
            slot.next = self.end;
            if !self.chunk.records.is_empty() {
                self.flush(slot, ready);
            }
        }
        Ok(true)
    }

    fn flush(&mut self, slot: &Slot, ready: &mut Vec<Chunk>) {
        self.sequence += 1;
        let mut next = new_chunk(self.lane, self.sequence, &slot.partition);
        if !self.done {
            // The next one will be as big; growing would copy it several times.
            next.data.reserve(self.chunk.data.len() + self.chunk.data.len() / 64);
            next.records.reserve(self.chunk.records.len());
        }
        ready.push(std::mem::replace(&mut self.chunk, next));
    }
}

fn new_chunk(lane: usize, sequence: u64, partition: &TopicPartition) -> Chunk {
    Chunk { lane, sequence, topic: partition.topic.clone(), partition: partition.partition, ..Chunk::default() }
}

fn available(client: &Client, partition: &TopicPartition, committed_only: bool) -> Option<OffsetRange> {
    let one = std::slice::from_ref(partition);
    let specs = [Spec::Earliest, Spec::Latest];
    let [earliest, latest] = admin::list_offsets(client, one, specs, committed_only, QUESTION_TIMEOUT).ok()?;
    let (earliest, latest) = (earliest.first()?, latest.first()?);
    let known = earliest.error == Code::NoError && latest.error == Code::NoError;
    known.then_some(OffsetRange { start: earliest.offset, end: latest.offset })
}

fn gone(partition: &TopicPartition, brokers: &str) -> Error {
    Error::Fatal {
        message: format!("{partition} no longer exists on {brokers}: the topic was deleted, or re-created smaller"),
    }
}

fn exists(client: &Client, partition: &TopicPartition) -> Option<bool> {
    let topics = admin::describe_topics(client, &[partition.topic.to_string()], EXISTS_TIMEOUT).ok()?;
    let topic = topics.first()?;
    match topic.error {
        Code::NoError => Some(topic.partitions.contains(&partition.partition)),
        Code::UnknownTopicOrPartition | Code::UnknownTopic => Some(false),
        _ => None,
    }
}
