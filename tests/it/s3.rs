use std::io::Write;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::broker::Broker;
use crate::support::check::{everything, fill, offsets_in_tables};
use crate::support::floe::{Pipeline, free_port, http_get};
use crate::support::reader::python;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

/// An S3-compatible server in memory: moto, whose conditional puts have one winner.
pub struct S3 {
    server: Child,
    pub address: String,
}

impl S3 {
    pub fn start() -> S3 {
        let port = free_port();
        let server = Command::new(python())
            .args(["-c", "import sys, threading, os\nthreading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()\nfrom moto.server import main\nmain(sys.argv[1:])"])
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("moto");
        let s3 = S3 { server, address: format!("127.0.0.1:{port}") };
        let deadline = Instant::now() + Duration::from_secs(60);
        while http_get(&s3.address, "/moto-api/").is_none() {
            assert!(Instant::now() < deadline, "moto does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        let mut stream = TcpStream::connect(&s3.address).unwrap();
        write!(
            stream,
            "PUT /bucket HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            s3.address
        )
        .unwrap();
        let answer = std::io::read_to_string(stream).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        s3
    }

    fn pipeline(&self, topic: &str) -> Pipeline {
        let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, topic);
        pipeline
            .set("checkpoint.location", format!("s3://bucket/{topic}"))
            .set("source.max_offsets_per_trigger", 700)
            .env("AWS_ENDPOINT", &format!("http://{}", self.address))
            .env("AWS_ALLOW_HTTP", "true")
            .env("AWS_ACCESS_KEY_ID", "test")
            .env("AWS_SECRET_ACCESS_KEY", "test")
            .env("AWS_REGION", "us-east-1");
        pipeline
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn telemetry() -> Telemetry {
    Telemetry { messages: 2_000, ..Telemetry::default() }
}

#[test]
fn a_checkpoint_on_s3_is_as_good_as_one_on_disk() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "on_s3";
    fill(broker, topic, &telemetry());
    let s3 = S3::start();
    let pipeline = s3.pipeline(topic);
    for step in
        ["plan.after_put", "execute.files_written", "state.after_put", "commit.committed", "commit_log.after_put"]
    {
        pipeline.run_failing(&format!("{step}:kill")).expect_killed();
    }
    pipeline.run();
    everything(&pipeline, broker, &telemetry());
}

#[test]
fn two_processes_on_one_checkpoint_on_s3() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "two_on_s3";
    fill(broker, topic, &telemetry());
    let s3 = S3::start();
    let pipeline = s3.pipeline(topic);
    for step in ["plan.before_put", "commit_log.before_put"] {
        let mut first = pipeline.spawn_with(&[("FLOE_FAILPOINT", &format!("{step}:stop"))]);
        first.until_stopped();
        let before = offsets_in_tables(&pipeline.tables());
        pipeline.run_failing("plan.after_put:kill").expect_killed();
        first.signal(libc::SIGCONT);
        first.wait().expect_code(3).expect_output(&["another process owns"]);
        assert!(offsets_in_tables(&pipeline.tables()) >= before);
    }
    pipeline.run();
    everything(&pipeline, broker, &telemetry());
}
