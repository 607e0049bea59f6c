//! AWS Signature Version 4 for requests with a body in memory: what Glue, S3 Tables and API gateways ask of their callers.
//!
//! Pure: the time is given. Checked against the vectors that AWS has published.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};

/// What is signed and by whom.
pub struct Signing<'a> {
    pub access_key_id: &'a str,
    pub secret_key: &'a str,
    pub region: &'a str,
    pub service: &'a str,
    pub now_ms: i64,
}

pub struct Request<'a> {
    pub method: &'a str,
    /// As it is sent.
    pub path: &'a str,
    /// Names and values, not encoded.
    pub query: &'a [(String, String)],
    /// All that are to be signed, `host` and `x-amz-date` among them; names in lower case.
    pub headers: &'a [(String, String)],
    pub body: &'a [u8],
}

impl Signing<'_> {
    /// The header `x-amz-date`.
    pub fn date(&self) -> String {
        let now = jiff::Timestamp::from_millisecond(self.now_ms).unwrap_or_default();
        now.strftime("%Y%m%dT%H%M%SZ").to_string()
    }

    /// The header `authorization`.
    pub fn authorization(&self, request: &Request<'_>) -> String {
        let date = self.date();
        let day = date.split('T').next().unwrap_or_default();
        let scope = format!("{day}/{}/{}/aws4_request", self.region, self.service);
        let (canonical, signed) = canonical(request);
        let to_sign = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", sha256(canonical.as_bytes()));
        let key = [day, self.region, self.service, "aws4_request"]
            .iter()
            .fold(format!("AWS4{}", self.secret_key).into_bytes(), |key, part| hmac(&key, part.as_bytes()).to_vec());
        let signature = hex(&hmac(&key, to_sign.as_bytes()));
        let id = self.access_key_id;
        format!("AWS4-HMAC-SHA256 Credential={id}/{scope}, SignedHeaders={signed}, Signature={signature}")
    }
}

/// The canonical request, and the names of the headers in it.
fn canonical(request: &Request<'_>) -> (String, String) {
    // Encoded once more than it is sent.
    let path = request.path.split('/').map(encode).collect::<Vec<_>>().join("/");
    let mut query: Vec<_> = request.query.iter().map(|(name, value)| (encode(name), encode(value))).collect();
    query.sort();
    let query = query.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&");
    let mut headers: Vec<_> = request.headers.iter().collect();
    headers.sort_by(|a, b| a.0.cmp(&b.0));
    let signed = headers.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(";");
    let mut text = format!("{}\n{path}\n{query}\n", request.method);
    for (name, value) in headers {
        let value = value.split_whitespace().collect::<Vec<_>>().join(" ");
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name}:{value}");
    }
    let _ = write!(text, "\n{signed}\n{}", sha256(request.body));
    (text, signed)
}

/// Percent-encodes all but RFC 3986's unreserved characters.
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(byte.into()),
            _ => {
                let _ = write!(encoded, "%{byte:02X}");
            }
        }
    }
    encoded
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// RFC 2104.
fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    const BLOCK: usize = 64;
    let mut block = [0; BLOCK];
    if key.len() > BLOCK {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let inner = Sha256::new().chain_update(block.map(|b| b ^ 0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(block.map(|b| b ^ 0x5c)).chain_update(inner).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2015-08-30T12:36:00Z
    const NOW_MS: i64 = 1_440_938_160_000;

    type Pairs = &'static [(&'static str, &'static str)];

    /// Name, method, path, query, headers beside host and date, body, signature.
    type Vector = (&'static str, &'static str, &'static str, Pairs, Pairs, &'static str, &'static str);

    const UNRESERVED: &str = "-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    const FORM: (&str, &str) = ("content-type", "application/x-www-form-urlencoded");

    #[rustfmt::skip]
    const SUITE: &[Vector] = &[
        ("get-vanilla", "GET", "/", &[], &[], "", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        ("get-vanilla-query-order-key-case", "GET", "/", &[("Param2", "value2"), ("Param1", "value1")], &[], "", "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"),
        ("get-vanilla-query-order-value", "GET", "/", &[("Param1", "value2"), ("Param1", "value1")], &[], "", "5772eed61e12b33fae39ee5e7012498b51d56abc0abb7c60486157bd471c4694"),
        ("get-vanilla-query-unreserved", "GET", "/", &[(UNRESERVED, UNRESERVED)], &[], "", "9c3e54bfcdf0b19771a7f523ee5669cdf59bc7cc0884027167c21bb143a40197"),
        ("get-vanilla-utf8-query", "GET", "/", &[("ሴ", "bar")], &[], "", "2cdec8eed098649ff3a119c94853b13c643bcf08f8b0a1d91e12c9027818dd04"),
        ("get-vanilla-empty-query-key", "GET", "/", &[("Param1", "value1")], &[], "", "a67d582fa61cc504c4bae71f336f98b97f1ea3c7a6bfe1b6e45aec72011b9aeb"),
        ("get-unreserved", "GET", "/-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", &[], &[], "", "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f"),
        ("get-utf8", "GET", "/ሴ", &[], &[], "", "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85"),
        ("get-space", "GET", "/example space/", &[], &[], "", "652487583200325589f1fba4c7e578f72c47cb61beeca81406b39ddec1366741"),
        ("get-header-value-trim", "GET", "/", &[], &[("my-header1", "value1"), ("my-header2", "\"a   b   c\"")], "", "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736"),
        ("get-header-key-duplicate", "GET", "/", &[], &[("my-header1", "value2,value2,value1")], "", "c9d5ea9f3f72853aea855b47ea873832890dbdd183b4468f858259531a5138ea"),
        ("post-vanilla", "POST", "/", &[], &[], "", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
        ("post-vanilla-query", "POST", "/", &[("Param1", "value1")], &[], "", "28038455d6de14eafc1f9222cf5aa6f1a96197d7deb8263271d420d138af7f11"),
        ("post-header-key-sort", "POST", "/", &[], &[("my-header1", "value1")], "", "c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c"),
        ("post-x-www-form-urlencoded", "POST", "/", &[], &[FORM], "Param1=value1", "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a"),
    ];

    #[test]
    fn aws_sig_v4_test_suite() {
        let signing = Signing {
            access_key_id: "AKIDEXAMPLE",
            secret_key: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
            region: "us-east-1",
            service: "service",
            now_ms: NOW_MS,
        };
        assert_eq!(signing.date(), "20150830T123600Z");
        for (name, method, path, query, more, body, signature) in SUITE {
            let own = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
                pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
            };
            let mut headers = own(&[("host", "example.amazonaws.com"), ("x-amz-date", "20150830T123600Z")]);
            headers.extend(own(more));
            let request = Request { method, path, query: &own(query), headers: &headers, body: body.as_bytes() };
            let found = signing.authorization(&request);
            assert!(found.ends_with(&format!("Signature={signature}")), "{name}: {found}\n{}", canonical(&request).0);
            assert!(found.starts_with(
                "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders="
            ));
        }
    }

    /// RFC 4231, test cases 1, 2 and 6: the last key is longer than a block.
    #[test]
    fn hmac_sha256() {
        for (key, message, mac) in [
            (vec![0x0b; 20], "Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
            (
                b"Jefe".to_vec(),
                "what do ya want for nothing?",
                "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            ),
            (
                vec![0xaa; 131],
                "Test Using Larger Than Block-Size Key - Hash Key First",
                "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
            ),
        ] {
            assert_eq!(hex(&hmac(&key, message.as_bytes())), mac);
        }
    }

    /// As Glue and S3 Tables want it: what is percent-encoded on the wire is encoded again.
    #[test]
    fn a_path_is_encoded_twice() {
        let request = Request {
            method: "GET",
            path: "/iceberg/v1/arn%3Aaws/namespaces/a%1Fb",
            query: &[],
            headers: &[("host".into(), "x".into())],
            body: b"",
        };
        assert!(canonical(&request).0.starts_with("GET\n/iceberg/v1/arn%253Aaws/namespaces/a%251Fb\n\nhost:x\n"));
    }
}
