//! The Kafka source against a real broker.

use crate::support::broker::Broker;

#[test]
fn broker_smoke() {
    let t = std::time::Instant::now();
    let broker = Broker::shared();
    println!("up {:?}", t.elapsed());
    broker.create_topic("smoke", 2, &[]);
    println!("topic {:?}", t.elapsed());
    broker.produce("smoke", Some(0), None, (0..10).map(|i| format!("{i}")));
    println!("produced {:?}", t.elapsed());
    assert_eq!(broker.watermarks("smoke", 0), (0, 10));
    broker.delete_records("smoke", 0, 4);
    assert_eq!(broker.watermarks("smoke", 0), (4, 10));
    broker.add_partitions("smoke", 3);
    println!("added {:?}", t.elapsed());
    broker.delete_topic("smoke");
    println!("deleted {:?}", t.elapsed());
    broker.create_topic("smoke", 1, &[]);
    assert_eq!(broker.watermarks("smoke", 0), (0, 0));
    println!("re-created {:?}", t.elapsed());
    let broker = Broker::start();
    println!("second {:?}", t.elapsed());
    broker.create_topic("smoke", 1, &[]);
    broker.produce("smoke", Some(0), None, ["a"]);
    broker.kill();
    broker.restart();
    println!("restarted after kill {:?}", t.elapsed());
    broker.produce("smoke", Some(0), None, ["a"]);
    println!("produced {:?}", t.elapsed());
    broker.stop();
    println!("stopped {:?}", t.elapsed());
    broker.restart();
    println!("restarted after stop {:?}", t.elapsed());
    broker.produce("smoke", Some(0), None, ["a"]);
    println!("produced {:?}", t.elapsed());
    broker.pause();
    broker.resume();
    assert_eq!(broker.watermarks("smoke", 0), (0, 3));
}
