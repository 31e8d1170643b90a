//! Who a host is: an Ed25519 key, and how people write and compare it.
//!
//! The private key lies in `<store>/host.key` (mode 0600) as PKCS#8 in PEM, which `openssl pkey` reads too. Invariant:
//! it never leaves this file's types; it is made once, atomically.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::str::FromStr;

use layerfs::{Error, Result, durable};
use ring::rand::SecureRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};

const FILE: &str = "host.key";
/// PKCS#8 version 1 in front of an Ed25519 seed (RFC 8410).
const PKCS8_PREFIX: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
/// SubjectPublicKeyInfo in front of an Ed25519 public key (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];
/// Digits that people don't mistake for one another (Crockford's base 32, in lower case).
const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const KEY_TAG: &str = "lfk-";
const KEY_DIGITS: usize = 52;

/// The points of small order, without the sign bit and in every encoding: signatures by them hold for most texts, so whoever
/// shows one proves nothing.
const SMALL_ORDER: [[u8; 32]; 7] = [
    [0; 32],
    with_ends(0x01, 0, 0),
    [
        0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98, 0xf0, 0xd5, 0xdf,
        0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53, 0xfc, 0x05,
    ],
    [
        0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f, 0x2a, 0x20,
        0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a,
    ],
    with_ends(0xec, 0xff, 0x7f),
    with_ends(0xed, 0xff, 0x7f),
    with_ends(0xee, 0xff, 0x7f),
];

const fn with_ends(first: u8, between: u8, last: u8) -> [u8; 32] {
    let mut bytes = [between; 32];
    bytes[0] = first;
    bytes[31] = last;
    bytes
}

/// A host's public key. As text, `lfk-` and 52 digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl PublicKey {
    /// The short form that people compare.
    pub fn fingerprint(&self) -> Fingerprint {
        let hash = blake3::derive_key("layerfs 2026 host fingerprint v1", &self.0);
        let mut bits = [0; 16];
        bits.copy_from_slice(&hash[..16]);
        bits[15] &= 0xf8;
        Fingerprint(bits)
    }

    /// The key as TLS shows it.
    pub(crate) fn to_spki(self) -> SubjectPublicKeyInfoDer<'static> {
        SubjectPublicKeyInfoDer::from([&SPKI_PREFIX[..], &self.0].concat())
    }

    /// The key that TLS shows, if it is an Ed25519 key that can prove anything.
    pub(crate) fn from_spki(spki: &[u8]) -> Option<PublicKey> {
        let key = spki.strip_prefix(&SPKI_PREFIX)?;
        Some(PublicKey(key.try_into().ok()?)).filter(|key: &PublicKey| !key.is_weak())
    }

    /// Whether anybody can sign by it.
    fn is_weak(&self) -> bool {
        let mut point = self.0;
        point[31] &= 0x7f;
        SMALL_ORDER.contains(&point)
    }

    /// The key that `text` is, weak or not: our own records have that of trusted streams too.
    fn from_text(text: &str) -> Result<PublicKey> {
        let digits = text.trim().strip_prefix(KEY_TAG).and_then(|digits| from_digits(digits, KEY_DIGITS));
        let key = digits.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        key.map(PublicKey).ok_or_else(|| {
            Error::invalid(format!("{text:?} is not a host's key: {KEY_TAG} and {KEY_DIGITS} digits are expected"))
        })
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{KEY_TAG}{}", to_digits(&self.0, KEY_DIGITS))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<PublicKey> {
        let key = PublicKey::from_text(text)?;
        if key.is_weak() {
            return Err(Error::invalid(format!("{text:?} is no host's key: anybody can sign by it")));
        }
        Ok(key)
    }
}

impl serde::Serialize for PublicKey {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for PublicKey {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<PublicKey, D::Error> {
        let text: String = serde::Deserialize::deserialize(d)?;
        PublicKey::from_text(&text).map_err(serde::de::Error::custom)
    }
}

/// The first 125 bits of a key's hash, as five groups of five digits: short enough to read aloud, too long to forge.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 16]);

const FINGERPRINT_DIGITS: usize = 25;

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = to_digits(&self.0, FINGERPRINT_DIGITS);
        let groups: Vec<&str> = (0..FINGERPRINT_DIGITS).step_by(5).map(|at| &digits[at..at + 5]).collect();
        f.pad(&groups.join("-"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Fingerprint> {
        let digits: String = text.chars().filter(|c| *c != '-' && !c.is_whitespace()).collect();
        let wrong =
            || Error::invalid(format!("{text:?} is not a fingerprint: five groups of five digits are expected"));
        let mut bits = from_digits(&digits, FINGERPRINT_DIGITS).ok_or_else(wrong)?;
        bits.resize(16, 0);
        Ok(Fingerprint(bits.try_into().map_err(|_| wrong())?))
    }
}

impl serde::Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// The first `count` digits of `bytes`, five bits each, the highest bits first; missing bits are 0.
fn to_digits(bytes: &[u8], count: usize) -> String {
    let bit = |at: usize| bytes.get(at / 8).map_or(0, |byte| byte >> (7 - at % 8) & 1);
    let digit = |at: usize| (0..5).fold(0, |value, offset| value << 1 | bit(at * 5 + offset));
    (0..count).map(|at| char::from(DIGITS[usize::from(digit(at))])).collect()
}

/// The reverse of [`to_digits`], in as many whole or begun bytes as the digits fill; surplus bits must be 0.
fn from_digits(text: &str, count: usize) -> Option<Vec<u8>> {
    if text.len() != count {
        return None;
    }
    let whole_bytes = count * 5 / 8;
    let mut bytes = vec![0u8; (count * 5).div_ceil(8)];
    for (at, digit) in text.bytes().enumerate() {
        // o, i and l are read as the digits that they look like.
        let digit = match digit.to_ascii_lowercase() {
            b'o' => b'0',
            b'i' | b'l' => b'1',
            other => other,
        };
        let value = DIGITS.iter().position(|other| *other == digit)?;
        for offset in 0..5 {
            let position = at * 5 + offset;
            bytes[position / 8] |= ((value >> (4 - offset) & 1) as u8) << (7 - position % 8);
        }
    }
    if count == KEY_DIGITS {
        (bytes[whole_bytes..].iter().all(|byte| *byte == 0)).then(|| bytes[..whole_bytes].to_vec())
    } else {
        Some(bytes)
    }
}

/// A host's key pair.
pub struct Identity {
    pkcs8: PrivatePkcs8KeyDer<'static>,
    public: PublicKey,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("public", &self.public).finish_non_exhaustive()
    }
}

impl Identity {
    /// A new key pair, kept nowhere.
    pub fn generate() -> Result<Identity> {
        let mut pkcs8 = PKCS8_PREFIX.to_vec();
        pkcs8.resize(PKCS8_PREFIX.len() + 32, 0);
        let filled = ring::rand::SystemRandom::new().fill(&mut pkcs8[PKCS8_PREFIX.len()..]);
        filled.map_err(|_| Error::io("getting random bytes for the host key", io::Error::other("no randomness")))?;
        Identity::from_pkcs8(PrivatePkcs8KeyDer::from(pkcs8))
    }

    /// The key pair of the store in `folder`, made if there is none yet.
    ///
    /// # Errors
    /// [`Error::Denied`] if others may read the key, [`Error::Corrupt`] if the file holds no Ed25519 key.
    pub fn load_or_create(folder: &Path) -> Result<Identity> {
        let path = folder.join(FILE);
        let pem = match fs::read(&path) {
            Ok(pem) => pem,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let identity = Identity::generate()?;
                durable::write(&path, identity.to_pem().as_bytes(), 0o600)?;
                return Ok(identity);
            }
            Err(error) => return Err(Error::file("read", &path, error)),
        };
        let mode = fs::metadata(&path).map_err(|e| Error::file("stat", &path, e))?.mode();
        if mode & 0o077 != 0 {
            return Err(Error::Denied(format!(
                "the host key {} can be read by others (mode {:o}); do `chmod 600` on it, or remove it to get a new one",
                path.display(),
                mode & 0o777
            )));
        }
        let pkcs8 = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|e| Error::corrupt("host key", e.to_string()))?;
        Identity::from_pkcs8(pkcs8)
    }

    fn from_pkcs8(pkcs8: PrivatePkcs8KeyDer<'static>) -> Result<Identity> {
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(pkcs8.secret_pkcs8_der());
        let pair = pair.map_err(|e| Error::corrupt("host key", e.to_string()))?;
        let public = <[u8; 32]>::try_from(pair.public_key().as_ref());
        let public = public.map_err(|_| Error::corrupt("host key", "its public half hasn't 32 bytes"))?;
        Ok(Identity { pkcs8, public: PublicKey(public) })
    }

    fn to_pem(&self) -> String {
        format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", base64(self.pkcs8.secret_pkcs8_der()))
    }

    /// The public half.
    pub fn public_key(&self) -> PublicKey {
        self.public
    }

    /// The public half's short form.
    pub fn fingerprint(&self) -> Fingerprint {
        self.public.fingerprint()
    }

    /// The private half, for TLS.
    pub(crate) fn pkcs8(&self) -> &PrivatePkcs8KeyDer<'static> {
        &self.pkcs8
    }
}

/// Base 64 of a multiple of three bytes, which an Ed25519 key's 48 are.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let four = |three: &[u8]| {
        let value = three.iter().fold(0u32, |value, byte| value << 8 | u32::from(*byte));
        [18, 12, 6, 0].map(|shift| char::from(ALPHABET[(value >> shift & 63) as usize]))
    };
    bytes.chunks_exact(3).flat_map(four).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_and_fingerprints_round_trip_as_text() {
        let key = Identity::generate().unwrap().public_key();
        assert_eq!(key.to_string().len(), 56);
        assert_eq!(key.to_string().parse::<PublicKey>().unwrap(), key);
        let fingerprint = key.fingerprint();
        assert_eq!(fingerprint.to_string().parse::<Fingerprint>().unwrap(), fingerprint);
        assert_eq!(
            fingerprint.to_string().to_uppercase().replace('-', " ").parse::<Fingerprint>().unwrap(),
            fingerprint
        );
        for wrong in ["", "lfk-", "lfk-0", &key.to_string()[1..], "u".repeat(52).as_str()] {
            assert!(wrong.parse::<PublicKey>().is_err() && wrong.parse::<Fingerprint>().is_err(), "{wrong}");
        }
        assert_eq!(PublicKey::from_spki(&key.to_spki()), Some(key));
    }

    #[test]
    fn keys_by_which_anybody_can_sign_are_refused() {
        for mut point in SMALL_ORDER {
            for sign in [0, 0x80] {
                point[31] = point[31] & 0x7f | sign;
                let key = PublicKey(point);
                assert!(
                    key.to_string().parse::<PublicKey>().is_err() && PublicKey::from_spki(&key.to_spki()).is_none()
                );
                // A journal may have the one of trusted streams.
                let json = serde_json::to_string(&key).unwrap();
                assert_eq!(serde_json::from_str::<PublicKey>(&json).unwrap(), key);
                point[1] ^= 1;
                assert!(PublicKey::from_spki(&PublicKey(point).to_spki()).is_some());
                point[1] ^= 1;
            }
        }
    }

    #[test]
    fn text_forms_are_pinned() {
        let key = PublicKey(*b"0123456789abcdefghijklmnopqrstuv");
        assert_eq!(key.to_string(), "lfk-60rk4csm6mv3ee1sc5h66s35cskpgtbaddp6tvkfe1rq4wvmenv0");
        assert_eq!(key.fingerprint().to_string(), "a48n3-a55an-0rjxt-p4j9d-4zafx");
    }

    #[test]
    fn the_key_is_made_once_and_kept_private() {
        let folder = tempfile::tempdir().unwrap();
        let first = Identity::load_or_create(folder.path()).unwrap().public_key();
        assert_eq!(Identity::load_or_create(folder.path()).unwrap().public_key(), first);
        let path = folder.path().join(FILE);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Identity::load_or_create(folder.path()), Err(Error::Denied(_))));
        fs::write(&path, "nonsense").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(Identity::load_or_create(folder.path()), Err(Error::Corrupt { .. })));
    }
}
