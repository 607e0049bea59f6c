//! One Kafka topic, written in transactions that also move a number forward.
//!
//! Owns: a transactional producer and the number of its consumer group. The number is the committed offset of partition 0
//! and moves in the same transaction as the records before it (KIP-98), so that what has been written can be known after
//! any death. Does not own: what is written ([`crate::dead_letter::topic`]). Methods block.
//!
//! Invariant: of all processes with one id only the last that was opened can commit; whatever a former one had begun is
//! aborted by then.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::{DeliveryResult, Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::config::SourceConfig;
use crate::sink::Error;

/// How long the brokers may take to answer one request.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of records that wait to be sent.
const QUEUE_KBYTES: &str = "65536";
/// librdkafka's upper bound: records were taken from Kafka, so they fit into it.
const MAX_MESSAGE_BYTES: &str = "1000000000";

/// A record to write.
pub struct Outgoing<'a> {
    pub key: Option<&'a [u8]>,
    pub value: Option<&'a [u8]>,
    pub headers: &'a [(&'a str, Option<&'a [u8]>)],
}

pub struct TransactionalTopic {
    topic: String,
    brokers: String,
    /// Taken by `drop`.
    clients: Option<Clients>,
}

struct Clients {
    producer: BaseProducer<Context>,
    group: BaseConsumer<Context>,
}

/// How many partitions a topic has. Fatal when it does not exist: it is not created, since only people know how many
/// partitions and copies it should have.
pub fn partitions(source: &SourceConfig, topic: &str) -> Result<usize, Error> {
    let client: BaseConsumer<Context> = create(&settings(source), source)?;
    partitions_of(&client, source, topic)
}

fn partitions_of(client: &BaseConsumer<Context>, source: &SourceConfig, topic: &str) -> Result<usize, Error> {
    let brokers = &source.bootstrap_servers;
    let deadline = Instant::now() + TIMEOUT;
    // A topic that has just been created is not known to every broker at once.
    let patience = Instant::now() + Duration::from_secs(2);
    loop {
        let metadata = client
            .fetch_metadata(Some(topic), deadline.saturating_duration_since(Instant::now()))
            .map_err(|e| failed(brokers, topic, "look for", &e))?;
        let found = metadata.topics().first();
        let code = found.and_then(|found| found.error()).map(Code::from);
        match (found.map_or(0, |found| found.partitions().len()), code) {
            (partitions, None) if partitions > 0 => return Ok(partitions),
            (_, Some(Code::TopicAuthorizationFailed)) => return Err(unauthorised(brokers, topic)),
            (_, None | Some(Code::UnknownTopicOrPartition | Code::UnknownTopic)) if Instant::now() > patience => {
                return Err(Error::fatal(format!(
                    "dead_letters.topic: topic {topic} does not exist on {brokers}: create it, or leave the setting out"
                )));
            }
            (_, Some(code)) if Instant::now() > patience => {
                return Err(Error::transient(format!("topic {topic} on {brokers}: {code}")));
            }
            _ => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

impl TransactionalTopic {
    /// Shuts out every other process of the same id and aborts what it had begun. `transaction_timeout` bounds how long a
    /// transaction may stay open, and with it how long readers may have to wait for a process that has died.
    pub fn open(
        source: &SourceConfig,
        topic: &str,
        id: &str,
        transaction_timeout: Duration,
    ) -> Result<TransactionalTopic, Error> {
        let brokers = source.bootstrap_servers.clone();
        let group: BaseConsumer<Context> = create(settings(source).set("group.id", id), source)?;
        partitions_of(&group, source, topic)?;
        // Between librdkafka's smallest value and the largest that brokers take by default.
        let timeout = transaction_timeout.clamp(Duration::from_secs(10), Duration::from_secs(900));
        let mut config = ClientConfig::new();
        // Keys go where Java's producers would send them.
        config.set("partitioner", "murmur2_random").set("linger.ms", "5").set("compression.type", "zstd");
        config.extend(settings(source).config_map().iter().map(|(k, v)| (k.to_string(), v.to_string())));
        config
            .set("transactional.id", id)
            .set("transaction.timeout.ms", timeout.as_millis().to_string())
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("message.max.bytes", MAX_MESSAGE_BYTES)
            .set("queue.buffering.max.kbytes", QUEUE_KBYTES);
        let producer: BaseProducer<Context> = create(&config, source)?;
        producer.init_transactions(TIMEOUT).map_err(|e| failed(&brokers, topic, "begin to write to", &e))?;
        Ok(TransactionalTopic { topic: topic.to_string(), brokers, clients: Some(Clients { producer, group }) })
    }

    /// The number that the last committed transaction set; none before the first, and where brokers have forgotten it.
    pub fn committed(&self) -> Result<Option<i64>, Error> {
        let mut asked = TopicPartitionList::new();
        asked.add_partition(&self.topic, 0);
        let answer = self
            .clients()?
            .group
            .committed_offsets(asked, TIMEOUT)
            .map_err(|e| self.failed("ask what is committed to", &e))?;
        let number = answer.elements().first().map(|element| element.offset());
        Ok(match number {
            Some(Offset::Offset(number)) => Some(number),
            _ => None,
        })
    }

    pub fn begin(&self) -> Result<(), Error> {
        self.clients()?.producer.begin_transaction().map_err(|e| self.failed("begin a transaction on", &e))
    }

    /// Waits for room while the brokers are slower.
    pub fn send(&self, record: &Outgoing<'_>) -> Result<(), Error> {
        let producer = &self.clients()?.producer;
        let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
        for (key, value) in record.headers {
            headers = headers.insert(Header { key, value: *value });
        }
        let mut next: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(&self.topic).headers(headers);
        if let Some(key) = record.key {
            next = next.key(key);
        }
        if let Some(value) = record.value {
            next = next.payload(value);
        }
        loop {
            match producer.send(next) {
                Ok(()) => {
                    producer.poll(Duration::ZERO);
                    return self.undelivered();
                }
                Err((KafkaError::MessageProduction(Code::QueueFull), back)) => {
                    next = back;
                    producer.poll(Duration::from_millis(20));
                    self.undelivered()?;
                }
                Err((e, _)) => return Err(self.failed("write to", &e)),
            }
        }
    }

    /// Ends the transaction: its records and the number appear together. `note` goes beside the number, for people.
    pub fn commit(&self, number: i64, note: &str) -> Result<(), Error> {
        let Clients { producer, group } = self.clients()?;
        producer.flush(TIMEOUT).map_err(|e| self.failed("write to", &e))?;
        self.undelivered()?;
        let mut numbers = TopicPartitionList::new();
        numbers
            .add_partition_offset(&self.topic, 0, Offset::Offset(number))
            .map_err(|e| self.failed("commit to", &e))?;
        if let Some(mut element) = numbers.elements().into_iter().next() {
            element.set_metadata(note);
        }
        let metadata = group
            .group_metadata()
            .ok_or_else(|| Error::transient("librdkafka has no metadata of a group".to_string()))?;
        producer
            .send_offsets_to_transaction(&numbers, &metadata, TIMEOUT)
            .and_then(|()| producer.commit_transaction(TIMEOUT))
            .map_err(|e| self.failed("commit to", &e))
    }

    /// The first record that the brokers did not take since the last look.
    fn undelivered(&self) -> Result<(), Error> {
        let failure =
            self.clients()?.producer.context().undelivered.lock().unwrap_or_else(PoisonError::into_inner).take();
        failure.map_or(Ok(()), |e| Err(self.failed("write to", &e)))
    }

    fn clients(&self) -> Result<&Clients, Error> {
        self.clients.as_ref().ok_or_else(|| Error::transient("the producer is closed".to_string()))
    }

    fn failed(&self, action: &str, error: &KafkaError) -> Error {
        failed(&self.brokers, &self.topic, action, error)
    }
}

impl Drop for TransactionalTopic {
    fn drop(&mut self) {
        // Closing may wait for brokers; nobody has to wait with it.
        if let Some(clients) = self.clients.take() {
            let _ = std::thread::Builder::new().name("kafka-close".into()).spawn(move || drop(clients));
        }
    }
}

/// The user's connection settings, which are written for a consumer: what means nothing here is left alone by librdkafka.
fn settings(source: &SourceConfig) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("reconnect.backoff.max.ms", "2000");
    for (key, value) in &source.kafka {
        // Of the consumer that reads, and none of this one's business.
        if key != "group.id" && key != "isolation.level" {
            config.set(key, value);
        }
    }
    config.set("bootstrap.servers", &source.bootstrap_servers);
    config.set_log_level(RDKafkaLogLevel::Warning);
    config
}

fn create<T: rdkafka::config::FromClientConfigAndContext<Context>>(
    config: &ClientConfig,
    source: &SourceConfig,
) -> Result<T, Error> {
    config.create_with_context(Context::default()).map_err(|e| match e {
        // Without the value, which may be a secret.
        KafkaError::ClientConfig(_, why, key, _) => {
            Error::fatal(format!("source.kafka: librdkafka refuses \"{key}\" for a producer: {why}"))
        }
        e => Error::transient(format!("cannot start a Kafka client for {}: {e}", source.bootstrap_servers)),
    })
}

fn failed(brokers: &str, topic: &str, action: &str, error: &KafkaError) -> Error {
    let code = match error {
        KafkaError::Transaction(e) => Some(e.code()),
        e => e.rdkafka_error_code(),
    };
    let message = format!("cannot {action} topic {topic} on {brokers}: {error}");
    match code {
        Some(Code::TopicAuthorizationFailed) => unauthorised(brokers, topic),
        Some(Code::TransactionalIdAuthorizationFailed | Code::ClusterAuthorizationFailed) => {
            Error::fatal(format!("{message}: grant Describe and Write on the transactional id"))
        }
        Some(Code::GroupAuthorizationFailed) => Error::fatal(format!("{message}: grant Read on the group")),
        Some(Code::MessageSizeTooLarge) => Error::transient(format!(
            "{message}: raise the topic's max.message.bytes to that of the topics that are read"
        )),
        // Whoever has taken over is found at the next look at the checkpoint's owners.
        Some(Code::Fenced | Code::ProducerFenced) => {
            Error::transient(format!("{message}: another process writes with the same transactional id"))
        }
        _ => Error::transient(message),
    }
}

fn unauthorised(brokers: &str, topic: &str) -> Error {
    Error::fatal(format!("not allowed to write to topic {topic} on {brokers}: grant Describe and Write on it"))
}

#[derive(Default)]
struct Context {
    undelivered: Mutex<Option<KafkaError>>,
}

impl ClientContext for Context {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(facility, message, "librdkafka, dead letters");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "librdkafka, dead letters");
    }
}

impl ConsumerContext for Context {}

impl ProducerContext for Context {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, _: ()) {
        if let Err((error, _)) = result {
            self.undelivered.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| error.clone());
        }
    }
}
