use std::path::Path;
use std::process::Command;

use crate::support::broker::{Broker, free_port};
use crate::support::check::{everything, fill};
use crate::support::floe::Pipeline;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

const PASSWORD: &str = "correct horse battery staple";

/// A key for the broker and the certificate that clients are to trust.
fn certificate(dir: &Path) -> (String, String) {
    let path = |name: &str| dir.join(name).display().to_string();
    let (store, certificate) = (path("broker.p12"), path("broker.pem"));
    let keytool = |arguments: &[&str]| {
        let store = ["-storetype", "PKCS12", "-keystore", &store, "-storepass", PASSWORD, "-alias", "broker"];
        let output =
            Command::new("keytool").args(arguments).args(store).output().expect("keytool, which comes with Java");
        assert!(output.status.success(), "{output:?}");
    };
    let name = ["-dname", "CN=localhost", "-ext", "SAN=ip:127.0.0.1", "-validity", "30"];
    keytool(&[&["-genkeypair", "-keyalg", "RSA"], &name[..]].concat());
    keytool(&["-exportcert", "-rfc", "-file", &certificate]);
    (store, certificate)
}

/// TLS and SASL are librdkafka's, passed through; the password comes from a mounted file and is shown nowhere.
#[test]
fn over_tls_with_a_password() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let (store, trusted) = certificate(dir.path());
    let secure = free_port();
    let jaas = format!("org.apache.kafka.common.security.plain.PlainLoginModule required user_floe=\"{PASSWORD}\";");
    let broker = Broker::start_with(&[
        (
            "listeners",
            &format!(
                "PLAINTEXT://127.0.0.1:{{port}},CONTROLLER://127.0.0.1:{{controller_port}},SECURE://127.0.0.1:{secure}"
            ),
        ),
        ("advertised.listeners", &format!("PLAINTEXT://127.0.0.1:{{port}},SECURE://127.0.0.1:{secure}")),
        ("listener.security.protocol.map", "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL"),
        ("listener.name.secure.sasl.enabled.mechanisms", "PLAIN"),
        ("listener.name.secure.plain.sasl.jaas.config", &jaas),
        ("listener.name.secure.ssl.keystore.type", "PKCS12"),
        ("listener.name.secure.ssl.keystore.location", &store),
        ("listener.name.secure.ssl.keystore.password", PASSWORD),
    ]);
    let telemetry = Telemetry { messages: 2_000, ..Telemetry::default() };
    fill(&broker, "secured", &telemetry);

    let password = dir.path().join("password");
    std::fs::write(&password, PASSWORD).unwrap();
    let mut pipeline = Pipeline::new(&format!("127.0.0.1:{secure}"), "secured");
    pipeline.kafka("security.protocol", "SASL_SSL").kafka("sasl.mechanism", "PLAIN").kafka("sasl.username", "floe");
    pipeline.env("FLOE_SOURCE__KAFKA__SASL_PASSWORD_FILE", password.to_str().unwrap());

    // A certificate that nobody vouches for: said, and waited out.
    let mut floe = pipeline.spawn();
    floe.until("it says what is wrong with the certificate", |floe| {
        floe.output().contains("certificate verify failed").then_some(())
    });
    floe.kill();

    pipeline.kafka("ssl.ca.location", &trusted);
    let ended = pipeline.spawn().wait().expect_code(0);
    assert!(!ended.output.contains(PASSWORD), "the password is in the log");
    everything(&pipeline, &broker, &telemetry);
}
