//! What is pulled from a registry that lies.

use std::collections::HashMap;
use std::sync::Arc;

use layerfs::LayerId;
use layerfs::error::ErrorClass;
use layerfs::manifest::Manifest;
use layerfs::monitor::Silent;
use layerfs::store::{Expect, GcOptions};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

use super::client::sha256;
use super::{Access, PullFrom, Pulled, image, parcels, pull};
use crate::error::{Error, Result};
use crate::governor::Controls;
use crate::tests::pair::{Host, add_layer, add_layer_over, name, silent, tree};

/// A registry that answers every question for a manifest with the same one.
struct Fake {
    manifest: Value,
    blobs: HashMap<String, Vec<u8>>,
}

impl Fake {
    /// One that has the stack with top `layer` of `host`.
    fn of(host: &Host, layer: LayerId) -> Fake {
        let folder = tempfile::tempdir().unwrap();
        let (manifest, blobs) = parcels::artifact(host.store(), layer, folder.path()).unwrap();
        Fake { manifest, blobs }
    }

    fn parcels(&mut self) -> &mut [Value] {
        &mut self.manifest["layers"].as_array_mut().unwrap()[1..]
    }

    /// Changes the list of layers.
    fn config(&mut self, change: impl FnOnce(&mut Vec<Value>)) {
        let old = self.manifest["config"]["digest"].as_str().unwrap().to_owned();
        let mut config: Value = serde_json::from_slice(&self.blobs[&old]).unwrap();
        change(config["layers"].as_array_mut().unwrap());
        let bytes = config.to_string().into_bytes();
        self.manifest["config"]["digest"] = json!(sha256(&bytes));
        self.manifest["config"]["size"] = json!(bytes.len());
        self.blobs.insert(sha256(&bytes), bytes);
    }

    /// What `host` makes of it, as the layer "pulled".
    async fn pulled_by(self, host: &Host) -> Result<Pulled> {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let fake = Arc::new(self);
        let server = tokio::spawn(async move {
            loop {
                let (stream, _) = socket.accept().await.unwrap();
                let fake = fake.clone();
                tokio::spawn(async move { fake.serve(stream).await });
            }
        });
        let from = PullFrom {
            address: format!("oci://{address}/team/app:1").parse().unwrap(),
            access: Access { login: None, plain_http: true },
            platform: None,
            name: name("pulled"),
            expect: Expect::Absent,
            controls: Controls::default(),
        };
        let pulled = pull(&host.node, &from, silent()).await;
        server.abort();
        pulled
    }

    async fn serve(&self, stream: tokio::net::TcpStream) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
            while line.trim_end() != "" {
                line.clear();
                stream.read_line(&mut line).await?;
            }
            let (status, kind, body) = self.answer(&path);
            let digest = sha256(&body);
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nDocker-Content-Digest: {digest}\r\n\r\n",
                body.len()
            );
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(&body).await?;
            stream.flush().await?;
        }
    }

    fn answer(&self, path: &str) -> (&'static str, &'static str, Vec<u8>) {
        if path == "/v2/" {
            return ("200 OK", "application/json", b"{}".to_vec());
        }
        if path.contains("/manifests/") {
            return ("200 OK", image::MANIFEST_TYPE, self.manifest.to_string().into_bytes());
        }
        let digest = path.rsplit('/').next().unwrap_or_default().replace("%3A", ":");
        match self.blobs.get(&digest) {
            Some(bytes) => ("200 OK", "application/octet-stream", bytes.clone()),
            None => ("404 Not Found", "application/json", b"{}".to_vec()),
        }
    }
}

/// A host with a stack of three layers, and these, the top first.
fn host_with_stack() -> (Host, Vec<LayerId>) {
    let host = Host::new();
    let base = add_layer(host.store(), "base", &tree(5, 400_000));
    let below = Manifest::load(host.store().as_ref(), base).unwrap().next_ino.0;
    let middle = add_layer_over(host.store(), "middle", &tree(3, 3000), base, below);
    let below = Manifest::load(host.store().as_ref(), middle).unwrap().next_ino.0;
    let top = add_layer_over(host.store(), "top", &tree(2, 5000), middle, below);
    (host, vec![top, middle, base])
}

fn class(error: &Error) -> ErrorClass {
    error.class()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stack_comes_whole() {
    let (host, layers) = host_with_stack();
    let there = Host::new();
    let pulled = Fake::of(&host, layers[0]).pulled_by(&there).await.unwrap();
    assert_eq!((pulled.layer, pulled.layers), (layers[0], 3));
    assert!(there.has_whole("pulled", layers[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_digest_leads_out_of_the_folder_and_no_size_is_believed() {
    let (host, layers) = host_with_stack();
    let outside = tempfile::tempdir().unwrap();
    let made = outside.path().join("made");
    let there = Host::new();
    let temporary = |host: &Host| std::fs::read_dir(host.store().tmp_folder()).unwrap().count();
    let before = temporary(&there);
    let beside = there.store().tmp_folder().join("sha256-beside");
    for digest in [made.to_str().unwrap(), "../sha256-beside", "sha256:../../sha256-beside", "sha256:", ""] {
        let mut fake = Fake::of(&host, layers[0]);
        fake.parcels()[0]["digest"] = json!(digest);
        let error = fake.pulled_by(&there).await.unwrap_err();
        assert_eq!(class(&error), ErrorClass::Unsupported, "{digest}: {error}");
        let mut fake = Fake::of(&host, layers[0]);
        fake.manifest["config"]["digest"] = json!(digest);
        assert_eq!(class(&fake.pulled_by(&there).await.unwrap_err()), ErrorClass::Unsupported);
        assert!(!made.exists() && !beside.exists(), "{digest}");
    }
    for size in [u64::MAX, (33 << 20) + 1] {
        let mut fake = Fake::of(&host, layers[0]);
        fake.parcels().iter_mut().for_each(|parcel| parcel["size"] = json!(size));
        let error = fake.pulled_by(&there).await.unwrap_err();
        assert_eq!(class(&error), ErrorClass::Corrupt, "{error}");
    }
    assert!(there.store().name(&name("pulled")).unwrap().is_none());
    assert_eq!(temporary(&there), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stack_that_leaves_layers_out_gets_no_name() {
    let (host, layers) = host_with_stack();
    // Without its base, without a layer between, upside down, twice.
    let lists: [&[usize]; 4] = [&[0, 1], &[0, 2], &[2, 1, 0], &[0, 1, 2, 2]];
    for (at, chosen) in lists.into_iter().enumerate() {
        let there = Host::new();
        let mut fake = Fake::of(&host, layers[0]);
        fake.config(|list| *list = chosen.iter().map(|at| list[*at].clone()).collect());
        let error = fake.pulled_by(&there).await.unwrap_err();
        assert_eq!(class(&error), ErrorClass::Corrupt, "{at}: {error}");
        assert!(there.store().name(&name("pulled")).unwrap().is_none());
        there.store().gc(&Silent, GcOptions::default()).unwrap();
    }
}
