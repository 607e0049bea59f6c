//! The little of librdkafka that `rdkafka` does not offer, made safe: a client whose closing never waits for brokers, and
//! queues of single partitions that hand out records in batches, borrowed, with end-of-partition and errors in place.
//!
//! Invariants: a queue keeps its client alive; messages die before their queue; callbacks borrow only what the client
//! keeps alive.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode as Code;
use rdkafka::{ClientConfig, TopicPartitionList};
use rdkafka_sys as sys;

use super::health::{self, Health};
use crate::source::Headers;

/// Records taken from a queue at once.
const BATCH: usize = 1024;

pub struct Client {
    pub(super) ptr: *mut sys::rd_kafka_t,
    pub health: Arc<Health>,
}

// SAFETY: librdkafka's handles may be used from any thread, concurrently.
unsafe impl Send for Client {}
// SAFETY: as above.
unsafe impl Sync for Client {}

impl Client {
    /// Connects in the background: fails only for settings that librdkafka refuses.
    pub fn new(config: &ClientConfig, health: Arc<Health>) -> Result<Client, String> {
        let native = config.create_native_config().map_err(|e| match e {
            // Without the value, which may be a secret.
            KafkaError::ClientConfig(_, why, key, _) => format!("\"{key}\": {why}"),
            e => e.to_string(),
        })?;
        let mut reason = [0 as c_char; 512];
        // SAFETY: `native` is a valid configuration; the callbacks have the signatures asked for; the opaque pointer is
        // valid as long as the client, which owns a reference to it and is destroyed first.
        let ptr = unsafe {
            sys::rd_kafka_conf_set_opaque(native.ptr(), Arc::as_ptr(&health) as *mut c_void);
            sys::rd_kafka_conf_set_log_cb(native.ptr(), Some(on_log));
            sys::rd_kafka_conf_set_error_cb(native.ptr(), Some(on_error));
            sys::rd_kafka_conf_set_offset_commit_cb(native.ptr(), Some(on_commit));
            sys::rd_kafka_new(sys::rd_kafka_type_t::RD_KAFKA_CONSUMER, native.ptr(), reason.as_mut_ptr(), reason.len())
        };
        if ptr.is_null() {
            // SAFETY: librdkafka leaves a terminated string.
            return Err(unsafe { text(reason.as_ptr()) });
        }
        // The client owns its configuration now.
        std::mem::forget(native);
        Ok(Client { ptr, health })
    }

    /// Serves what librdkafka wants to call back: errors, finished commits, tokens to refresh.
    pub fn serve(&self) {
        // SAFETY: the client is alive.
        unsafe { sys::rd_kafka_poll(self.ptr, 0) };
        self.drain();
    }

    /// Errors of the consumer as a whole: partitions have queues of their own, so nothing else comes here, and the group
    /// is not needed for reading.
    fn drain(&self) {
        // SAFETY: the client is alive; the queue is ours to destroy, and each message that it hands out.
        unsafe {
            let queue = sys::rd_kafka_queue_get_consumer(self.ptr);
            if queue.is_null() {
                return;
            }
            let mut batch = [ptr::null_mut(); 16];
            let count = sys::rd_kafka_consume_batch_queue(queue, 0, batch.as_mut_ptr(), batch.len());
            for &message in &batch[..usize::try_from(count).unwrap_or(0)] {
                let message = Message(message);
                tracing::debug!(reason = text(sys::rd_kafka_message_errstr(message.0)), "kafka consumer error");
            }
            sys::rd_kafka_queue_destroy(queue);
        }
    }

    /// Adds partitions, with the offsets to begin at, to the assignment.
    pub fn assign(&self, partitions: &TopicPartitionList) -> Result<(), String> {
        // SAFETY: the client and the list are alive; the list is copied.
        error_text(unsafe { sys::rd_kafka_incremental_assign(self.ptr, partitions.ptr()) })
    }

    /// One past the last offset that was taken from the partition's queue, control records included; end-of-partition
    /// events count as records.
    pub fn position(&self, topic: &str, partition: i32) -> Option<i64> {
        let mut list = TopicPartitionList::with_capacity(1);
        list.add_partition(topic, partition);
        // SAFETY: the client and the list are alive; the list has one element, which librdkafka fills.
        unsafe {
            let err = sys::rd_kafka_position(self.ptr, list.ptr());
            let offset = (*(*list.ptr()).elems).offset;
            (err == sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR && offset >= 0).then_some(offset)
        }
    }

    /// Commits to the consumer group in the background; the outcome comes to `Health::committed`.
    pub fn commit(&self, offsets: &TopicPartitionList) -> Result<(), Code> {
        // SAFETY: the client and the list are alive; the list is copied.
        let err = unsafe { sys::rd_kafka_commit(self.ptr, offsets.ptr(), 1) };
        if err == sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR { Ok(()) } else { Err(err.into()) }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // SAFETY: nothing uses the client any more: queues hold a reference to it. There is no group to leave, and
        // closing could wait for a coordinator that is away.
        unsafe { sys::rd_kafka_destroy_flags(self.ptr, sys::RD_KAFKA_DESTROY_F_NO_CONSUMER_CLOSE as c_int) };
    }
}

/// Wakes the reading thread: records have come, or a command.
#[derive(Default)]
pub struct Wake {
    awake: Mutex<bool>,
    changed: Condvar,
}

impl Wake {
    pub fn wake(&self) {
        *self.awake.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_one();
    }

    /// Until woken, at once if that has happened since the last wait.
    pub fn wait(&self, timeout: Duration) {
        let awake = self.awake.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(awake, timeout, |awake| !*awake);
        let (mut awake, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *awake = false;
    }
}

/// What comes next in a partition.
pub enum Event<'a> {
    Record(RecordView<'a>),
    /// Everything below this offset has been handed out, and there was no more when the broker was asked.
    End(i64),
    Error(Code, String),
}

/// A record, in librdkafka's memory.
pub struct RecordView<'a>(&'a sys::rd_kafka_message_t);

impl<'a> RecordView<'a> {
    #[inline]
    pub fn offset(&self) -> i64 {
        self.0.offset
    }

    #[inline]
    pub fn key(&self) -> Option<&'a [u8]> {
        // SAFETY: librdkafka's pointer and length of the key, valid as long as the message.
        unsafe { bytes(self.0.key, self.0.key_len) }
    }

    #[inline]
    pub fn value(&self) -> Option<&'a [u8]> {
        // SAFETY: as for the key.
        unsafe { bytes(self.0.payload, self.0.len) }
    }

    #[inline]
    pub fn timestamp_ms(&self) -> Option<i64> {
        let mut kind = sys::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_NOT_AVAILABLE;
        // SAFETY: the message is alive.
        let timestamp = unsafe { sys::rd_kafka_message_timestamp(self.0, &mut kind) };
        (kind != sys::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_NOT_AVAILABLE).then_some(timestamp)
    }

    /// Nothing for a record without headers.
    #[inline]
    pub fn headers(&self) -> Option<Headers> {
        let mut headers = ptr::null_mut();
        // SAFETY: the message is alive and keeps the headers.
        let err = unsafe { sys::rd_kafka_message_headers(self.0, &mut headers) };
        if err != sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
            return None;
        }
        let mut all = Vec::new();
        loop {
            let (mut name, mut value, mut size) = (ptr::null(), ptr::null(), 0);
            // SAFETY: the headers are alive; name and value are set on success.
            let header = unsafe {
                let err = sys::rd_kafka_header_get_all(headers, all.len(), &mut name, &mut value, &mut size);
                if err != sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
                    return Some(all);
                }
                (text(name), bytes(value, size).map(<[u8]>::to_vec))
            };
            all.push(header);
        }
    }
}

/// The records of one partition, in order. What is not taken stays, here or with librdkafka, for the next batch.
pub struct PartitionQueue {
    // Dropped before the queue, and the queue before the client.
    backlog: VecDeque<Message>,
    queue: Queue,
}

struct Message(*mut sys::rd_kafka_message_t);

// SAFETY: a message is plain memory with an atomic reference count.
unsafe impl Send for Message {}

impl Drop for Message {
    fn drop(&mut self) {
        // SAFETY: it came from librdkafka and is destroyed once.
        unsafe { sys::rd_kafka_message_destroy(self.0) };
    }
}

struct Queue {
    ptr: *mut sys::rd_kafka_queue_t,
    // The queue's callback borrows it.
    _wake: Arc<Wake>,
    _client: Arc<Client>,
}

// SAFETY: librdkafka's queues may be used from any thread.
unsafe impl Send for Queue {}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: after this no callback runs any more: both take the queue's lock.
        unsafe {
            sys::rd_kafka_queue_cb_event_enable(self.ptr, None, ptr::null_mut());
            sys::rd_kafka_queue_destroy(self.ptr);
        }
    }
}

impl PartitionQueue {
    /// Before the partition is assigned, so that all of its records come here.
    pub fn new(client: &Arc<Client>, wake: &Arc<Wake>, topic: &str, partition: i32) -> Option<PartitionQueue> {
        let topic = CString::new(topic).ok()?;
        // SAFETY: the client is alive; forwarding to nothing is how a partition gets a queue of its own; the callback's
        // argument outlives it (see `Queue`).
        unsafe {
            let queue = sys::rd_kafka_queue_get_partition(client.ptr, topic.as_ptr(), partition);
            if queue.is_null() {
                return None;
            }
            sys::rd_kafka_queue_forward(queue, ptr::null_mut());
            sys::rd_kafka_queue_cb_event_enable(queue, Some(on_records), Arc::as_ptr(wake) as *mut c_void);
            let queue = Queue { ptr: queue, _wake: wake.clone(), _client: client.clone() };
            Some(PartitionQueue { backlog: VecDeque::with_capacity(BATCH), queue })
        }
    }

    /// Takes what librdkafka has, without waiting. False: nothing is there.
    pub fn fill(&mut self) -> bool {
        if self.backlog.is_empty() {
            let mut batch = [ptr::null_mut(); BATCH];
            // SAFETY: room for BATCH pointers, of which the first `count` are set and then ours.
            let count = unsafe { sys::rd_kafka_consume_batch_queue(self.queue.ptr, 0, batch.as_mut_ptr(), BATCH) };
            let count = usize::try_from(count).unwrap_or(0);
            self.backlog.extend(batch[..count].iter().map(|&message| Message(message)));
        }
        !self.backlog.is_empty()
    }

    /// The first of those taken.
    #[inline]
    pub fn peek(&self) -> Option<Event<'_>> {
        // SAFETY: the message lives until it is popped, which needs this borrow to have ended.
        self.backlog.front().map(|message| unsafe {
            let message = &*message.0;
            match message.err {
                sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR => Event::Record(RecordView(message)),
                sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR__PARTITION_EOF => Event::End(message.offset),
                err => Event::Error(err.into(), text(sys::rd_kafka_message_errstr(message))),
            }
        })
    }

    #[inline]
    pub fn pop(&mut self) {
        self.backlog.pop_front();
    }
}

unsafe extern "C" fn on_records(_: *mut sys::rd_kafka_t, wake: *mut c_void) {
    // SAFETY: the `Wake` that `Queue` keeps alive.
    unsafe { &*(wake as *const Wake) }.wake();
}

unsafe extern "C" fn on_log(_: *const sys::rd_kafka_t, level: c_int, facility: *const c_char, line: *const c_char) {
    // SAFETY: terminated strings of librdkafka.
    let (facility, line) = unsafe { (text(facility), text(line)) };
    health::log(level, facility.trim(), line.trim());
}

unsafe extern "C" fn on_error(_: *mut sys::rd_kafka_t, code: c_int, reason: *const c_char, health: *mut c_void) {
    // SAFETY: the `Health` that `Client` keeps alive, and a terminated string.
    unsafe { (*(health as *const Health)).error(code, text(reason).trim()) };
}

unsafe extern "C" fn on_commit(
    _: *mut sys::rd_kafka_t,
    err: sys::rd_kafka_resp_err_t,
    _: *mut sys::rd_kafka_topic_partition_list_t,
    health: *mut c_void,
) {
    let code = Code::from(err);
    let failure = (code != Code::NoError).then(|| code.to_string());
    // SAFETY: the `Health` that `Client` keeps alive.
    unsafe { (*(health as *const Health)).committed(failure.as_deref()) };
}

/// SAFETY: null or a terminated string.
pub(super) unsafe fn text(string: *const c_char) -> String {
    if string.is_null() {
        return String::new();
    }
    // SAFETY: not null, and the caller's promise.
    unsafe { CStr::from_ptr(string) }.to_string_lossy().into_owned()
}

/// SAFETY: null or `len` bytes that live for `'a`.
#[inline]
unsafe fn bytes<'a>(data: *const c_void, len: usize) -> Option<&'a [u8]> {
    // SAFETY: not null, and the caller's promise.
    (!data.is_null()).then(|| unsafe { std::slice::from_raw_parts(data as *const u8, len) })
}

pub(super) fn error_text(error: *mut sys::rd_kafka_error_t) -> Result<(), String> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: an error that is ours to destroy.
    unsafe {
        let message = text(sys::rd_kafka_error_string(error));
        sys::rd_kafka_error_destroy(error);
        Err(message)
    }
}
