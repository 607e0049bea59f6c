//! Questions to the brokers, asked with the connections that there are: DescribeTopics (partitions and topic ids) and ListOffsets
//! by isolation level, which `rdkafka` does not ask, each for everything at once, and DescribeConfigs.
#![allow(unsafe_code)]

use std::ffi::{CString, c_int};
use std::ptr;
use std::time::{Duration, Instant};

use rdkafka::TopicPartitionList;
use rdkafka::topic_partition_list::Offset;
use rdkafka::types::RDKafkaErrorCode as Code;
use rdkafka_sys as sys;

use super::native::{Client, error_text, text};
use crate::batch::TopicPartition;

pub enum Failure {
    /// The brokers refused the credentials.
    Refused(String),
    /// Anything else: brokers away, most likely.
    Failed(String),
}

pub struct Topic {
    pub name: String,
    /// None from brokers that know no topic ids (before 2.8).
    pub id: Option<String>,
    pub partitions: Vec<i32>,
    pub error: Code,
}

/// Which offset of a partition.
#[derive(Clone, Copy)]
pub enum Spec {
    Earliest,
    Latest,
    AtTime(i64),
}

pub struct Listed {
    pub partition: TopicPartition,
    /// -1: no record at or after the time.
    pub offset: i64,
    pub error: Code,
}

pub fn describe_topics(client: &Client, names: &[String], timeout: Duration) -> Result<Vec<Topic>, Failure> {
    let names: Vec<CString> = names.iter().filter_map(|name| CString::new(name.as_str()).ok()).collect();
    let mut pointers: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
    let broker = any_broker(client, timeout)?;
    let op = sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS;
    let call = Call::start(client, op, None, timeout, |client, options, queue| {
        // SAFETY: client, options and queue are alive; the names are copied.
        unsafe {
            // Any broker knows the topics; by default librdkafka waits for the controller, which may be the one that is
            // away, and which its own mock cluster does not have.
            sys::rd_kafka_AdminOptions_set_broker(options, broker, ptr::null_mut(), 0);
            let topics = sys::rd_kafka_TopicCollection_of_topic_names(pointers.as_mut_ptr(), pointers.len());
            sys::rd_kafka_DescribeTopics(client, topics, options, queue);
            sys::rd_kafka_TopicCollection_destroy(topics);
        }
    });
    let event = call.finish()?;
    // SAFETY: the event is of this type and keeps alive everything that is read from it.
    unsafe {
        let result = sys::rd_kafka_event_DescribeTopics_result(event.0);
        let mut count = 0;
        let topics = sys::rd_kafka_DescribeTopics_result_topics(result, &mut count);
        Ok((0..count).map(|i| topic(*topics.add(i))).collect())
    }
}

/// The id of a broker that answers now. Waits for one in slices, so that refused credentials are heard of at once.
fn any_broker(client: &Client, timeout: Duration) -> Result<i32, Failure> {
    let deadline = Instant::now() + timeout;
    loop {
        client.serve();
        if let Some(reason) = client.health.refused() {
            return Err(Failure::Refused(reason));
        }
        let mut metadata = ptr::null();
        // SAFETY: the client is alive; no topic is named and the answer is freed below.
        let code = unsafe { sys::rd_kafka_metadata(client.ptr, 0, ptr::null_mut(), &mut metadata, 500) };
        if !metadata.is_null() {
            // SAFETY: the answer is alive, with as many brokers as it says.
            let broker = unsafe {
                let answer = &*metadata;
                let first = (answer.broker_cnt > 0).then(|| (*answer.brokers).id);
                let broker = if answer.orig_broker_id >= 0 { Some(answer.orig_broker_id) } else { first };
                sys::rd_kafka_metadata_destroy(metadata);
                broker
            };
            if let Some(broker) = broker {
                return Ok(broker);
            }
        }
        if Instant::now() > deadline {
            let reason = client.health.last_reason().unwrap_or_else(|| Code::from(code).to_string());
            return Err(Failure::Failed(reason));
        }
    }
}

/// SAFETY: a description whose result is alive.
unsafe fn topic(description: *const sys::rd_kafka_TopicDescription_t) -> Topic {
    // SAFETY: the caller's promise; everything read belongs to the description.
    unsafe {
        let mut count = 0;
        let partitions = sys::rd_kafka_TopicDescription_partitions(description, &mut count);
        let id = sys::rd_kafka_TopicDescription_topic_id(description);
        let known = !id.is_null()
            && (sys::rd_kafka_Uuid_most_significant_bits(id) != 0
                || sys::rd_kafka_Uuid_least_significant_bits(id) != 0);
        let error = sys::rd_kafka_TopicDescription_error(description);
        Topic {
            name: text(sys::rd_kafka_TopicDescription_name(description)),
            id: known.then(|| text(sys::rd_kafka_Uuid_base64str(id))),
            partitions: (0..count).map(|i| sys::rd_kafka_TopicPartitionInfo_partition(*partitions.add(i))).collect(),
            error: if error.is_null() { Code::NoError } else { sys::rd_kafka_error_code(error).into() },
        }
    }
}

/// One request for all partitions, for each of `specs` at the same time.
pub fn list_offsets<const N: usize>(
    client: &Client,
    partitions: &[TopicPartition],
    specs: [Spec; N],
    committed_only: bool,
    timeout: Duration,
) -> Result<[Vec<Listed>; N], Failure> {
    if partitions.is_empty() {
        return Ok(std::array::from_fn(|_| Vec::new()));
    }
    let op = sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_LISTOFFSETS;
    let calls = specs.map(|spec| {
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for p in partitions {
            list.add_partition(&p.topic, p.partition);
        }
        // In this request the offset carries the question.
        let question = match spec {
            Spec::Earliest => sys::rd_kafka_OffsetSpec_t::RD_KAFKA_OFFSET_SPEC_EARLIEST as i64,
            Spec::Latest => sys::rd_kafka_OffsetSpec_t::RD_KAFKA_OFFSET_SPEC_LATEST as i64,
            Spec::AtTime(timestamp_ms) => timestamp_ms.max(0),
        };
        Call::start(client, op, Some(committed_only), timeout, |client, options, queue| {
            // SAFETY: client, options and queue are alive; the list is copied; its elements are plain memory.
            unsafe {
                let raw = &mut *list.ptr();
                for i in 0..usize::try_from(raw.cnt).unwrap_or(0) {
                    (*raw.elems.add(i)).offset = question;
                }
                sys::rd_kafka_ListOffsets(client, list.ptr(), options, queue);
            }
        })
    });
    let mut answers = std::array::from_fn(|_| Vec::new());
    for (answer, call) in answers.iter_mut().zip(calls) {
        let event = call.finish()?;
        // SAFETY: the event is of this type and keeps alive everything that is read from it.
        *answer = unsafe {
            let result = sys::rd_kafka_event_ListOffsets_result(event.0);
            let mut count = 0;
            let infos = sys::rd_kafka_ListOffsets_result_infos(result, &mut count);
            (0..count)
                .map(|i| {
                    let p = &*sys::rd_kafka_ListOffsetsResultInfo_topic_partition(*infos.add(i));
                    let partition = TopicPartition::new(text(p.topic), p.partition);
                    Listed { partition, offset: p.offset, error: p.err.into() }
                })
                .collect()
        };
    }
    Ok(answers)
}

/// What a setting of a topic is, or why that is not told.
pub struct Setting {
    pub topic: String,
    pub value: Result<String, Code>,
}

/// One setting, of every topic.
pub fn topic_setting(
    client: &Client,
    topics: &[String],
    setting: &str,
    timeout: Duration,
) -> Result<Vec<Setting>, Failure> {
    let names: Vec<CString> = topics.iter().filter_map(|name| CString::new(name.as_str()).ok()).collect();
    let op = sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBECONFIGS;
    let call = Call::start(client, op, None, timeout, |client, options, queue| {
        let kind = sys::rd_kafka_ResourceType_t::RD_KAFKA_RESOURCE_TOPIC;
        // SAFETY: client, options and queue are alive; the resources are ours and copied by the call.
        unsafe {
            let mut resources: Vec<_> =
                names.iter().map(|name| sys::rd_kafka_ConfigResource_new(kind, name.as_ptr())).collect();
            sys::rd_kafka_DescribeConfigs(client, resources.as_mut_ptr(), resources.len(), options, queue);
            sys::rd_kafka_ConfigResource_destroy_array(resources.as_mut_ptr(), resources.len());
        }
    });
    let event = call.finish()?;
    // SAFETY: the event is of this type and keeps alive everything that is read from it.
    unsafe {
        let result = sys::rd_kafka_event_DescribeConfigs_result(event.0);
        let mut count = 0;
        let resources = sys::rd_kafka_DescribeConfigs_result_resources(result, &mut count);
        let value = |resource| {
            let error = Code::from(sys::rd_kafka_ConfigResource_error(resource));
            if error != Code::NoError {
                return Err(error);
            }
            let mut count = 0;
            let entries = sys::rd_kafka_ConfigResource_configs(resource, &mut count);
            let mut entries = (0..count).map(|i| *entries.add(i));
            let entry = entries.find(|entry| text(sys::rd_kafka_ConfigEntry_name(*entry)) == setting);
            Ok(entry.map(|entry| text(sys::rd_kafka_ConfigEntry_value(entry))).unwrap_or_default())
        };
        Ok((0..count)
            .map(|i| *resources.add(i))
            .map(|resource| Setting {
                topic: text(sys::rd_kafka_ConfigResource_name(resource)),
                value: value(resource),
            })
            .collect())
    }
}

/// What the offsets were set to in an [`Offset`] list; used by the group report.
pub fn offset_list<'a>(offsets: impl Iterator<Item = (&'a TopicPartition, i64)>) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for (p, offset) in offsets {
        // Fails only for offsets below zero, which no partition has.
        let _ = list.add_partition_offset(&p.topic, p.partition, Offset::Offset(offset));
    }
    list
}

/// A request on its way, with a queue of its own for the answer.
struct Call<'a> {
    client: &'a Client,
    queue: *mut sys::rd_kafka_queue_t,
    deadline: Instant,
}

impl<'a> Call<'a> {
    fn start(
        client: &'a Client,
        op: sys::rd_kafka_admin_op_t,
        committed_only: Option<bool>,
        timeout: Duration,
        request: impl FnOnce(*mut sys::rd_kafka_t, *mut sys::rd_kafka_AdminOptions_t, *mut sys::rd_kafka_queue_t),
    ) -> Call<'a> {
        // SAFETY: the client is alive; options and queue are created and destroyed here and in `drop`.
        unsafe {
            let options = sys::rd_kafka_AdminOptions_new(client.ptr, op);
            let timeout_ms = c_int::try_from(timeout.as_millis()).unwrap_or(c_int::MAX);
            sys::rd_kafka_AdminOptions_set_request_timeout(options, timeout_ms, ptr::null_mut(), 0);
            if let Some(committed_only) = committed_only {
                let level = if committed_only {
                    sys::rd_kafka_IsolationLevel_t::RD_KAFKA_ISOLATION_LEVEL_READ_COMMITTED
                } else {
                    sys::rd_kafka_IsolationLevel_t::RD_KAFKA_ISOLATION_LEVEL_READ_UNCOMMITTED
                };
                if let Err(reason) = error_text(sys::rd_kafka_AdminOptions_set_isolation_level(options, level)) {
                    tracing::warn!(reason, "librdkafka does not take the isolation level for planning");
                }
            }
            let queue = sys::rd_kafka_queue_new(client.ptr);
            request(client.ptr, options, queue);
            sys::rd_kafka_AdminOptions_destroy(options);
            // librdkafka answers a request that timed out; the margin is for a busy machine.
            Call { client, queue, deadline: Instant::now() + timeout + Duration::from_secs(2) }
        }
    }

    fn finish(self) -> Result<OwnedEvent, Failure> {
        loop {
            // Serves token refreshes, without which a connection may never come to be, and errors.
            self.client.serve();
            if let Some(reason) = self.client.health.refused() {
                return Err(Failure::Refused(reason));
            }
            // SAFETY: the queue is alive; the event is ours.
            let event = OwnedEvent(unsafe { sys::rd_kafka_queue_poll(self.queue, 50) });
            if !event.0.is_null() {
                // SAFETY: the event is alive.
                let (code, reason) = unsafe {
                    let code = Code::from(sys::rd_kafka_event_error(event.0));
                    (code, text(sys::rd_kafka_event_error_string(event.0)))
                };
                return if code == Code::NoError { Ok(event) } else { Err(Failure::Failed(reason)) };
            }
            if Instant::now() > self.deadline {
                return Err(Failure::Failed("no answer".into()));
            }
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        // SAFETY: ours; an answer that comes later finds it disabled.
        unsafe { sys::rd_kafka_queue_destroy(self.queue) };
    }
}

struct OwnedEvent(*mut sys::rd_kafka_event_t);

impl Drop for OwnedEvent {
    fn drop(&mut self) {
        // SAFETY: ours; librdkafka ignores null.
        unsafe { sys::rd_kafka_event_destroy(self.0) };
    }
}
