//! The subject of a certificate as a value, and the text it is written as: RFC 4514, most specific part first, as in
//! `CN=backup-1,OU=Storage,O=Example`.

use std::str::FromStr;

use x509_cert::attr::AttributeTypeAndValue;
use x509_cert::der::asn1::{Ia5StringRef, ObjectIdentifier, PrintableStringRef, TeletexStringRef, Utf8StringRef};
use x509_cert::der::oid::db::DB;
use x509_cert::der::{Encode, Tag, Tagged};
use x509_cert::name::Name;

/// A distinguished name. Two are equal if they have the same parts in the same order, each of the same attribute types with the
/// same values to the letter; in which of ASN.1's kinds of strings a value is encoded makes no difference.
///
/// As text: types by their short names (`CN`, `OU`, `O`, `C`, `DC`, `UID`, `emailAddress` and so on, in any case) or as a dotted
/// number, values with `,` `+` `"` `\` `<` `>` `;` behind a backslash or any byte as `\` and two hexadecimal digits, `+` between
/// the types of a part with several. Spaces around a part do not count. `openssl x509 -noout -subject -nameopt RFC2253` prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject(
    /// From the most general part on, each sorted.
    Vec<Vec<Attribute>>,
);

type Attribute = (ObjectIdentifier, Value);

/// What ends a value, and the text behind it.
type Next<'a> = Option<(char, &'a str)>;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Value {
    Text(String),
    /// What is no text, as DER.
    Other(Vec<u8>),
}

/// Why a text is no subject.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no subject such as CN=backup-1,O=Example: {reason}")]
pub struct SubjectError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl From<&Name> for Subject {
    fn from(name: &Name) -> Self {
        let part = |attributes: &mut dyn Iterator<Item = &AttributeTypeAndValue>| {
            sorted(attributes.map(|attribute| (attribute.oid, value(attribute))).collect())
        };
        Self(name.iter_rdn().map(|rdn| part(&mut rdn.iter())).collect())
    }
}

fn value(attribute: &AttributeTypeAndValue) -> Value {
    let any = &attribute.value;
    let text = match any.tag() {
        Tag::Utf8String => Utf8StringRef::try_from(any).ok().map(|text| text.as_str().to_owned()),
        Tag::PrintableString => PrintableStringRef::try_from(any).ok().map(|text| text.as_str().to_owned()),
        Tag::Ia5String => Ia5StringRef::try_from(any).ok().map(|text| text.as_str().to_owned()),
        Tag::TeletexString => TeletexStringRef::try_from(any).ok().map(|text| text.as_str().to_owned()),
        _ => None,
    };
    text.map_or_else(|| Value::Other(any.to_der().unwrap_or_default()), Value::Text)
}

fn sorted(mut part: Vec<Attribute>) -> Vec<Attribute> {
    part.sort();
    part
}

impl FromStr for Subject {
    type Err = SubjectError;

    fn from_str(text: &str) -> Result<Self, SubjectError> {
        parse(text).map_err(|reason| SubjectError { text: text.to_owned(), reason })
    }
}

fn parse(text: &str) -> Result<Subject, &'static str> {
    let mut parts = Vec::new();
    let mut part = Vec::new();
    let mut rest = text;
    loop {
        let (kind, behind) = rest.split_once('=').ok_or("a part has no =")?;
        let kind = kind.trim_matches(' ');
        let kind = match DB.by_name(kind) {
            Some(kind) => *kind,
            None => ObjectIdentifier::new(kind).map_err(|_| "the type of a part is not known")?,
        };
        let (value, end) = unescape(behind.trim_start_matches(' '))?;
        part.push((kind, Value::Text(value)));
        match end {
            Some(('+', behind)) => rest = behind,
            Some((_, behind)) => {
                parts.push(sorted(std::mem::take(&mut part)));
                rest = behind;
            }
            None => break,
        }
    }
    parts.push(sorted(part));
    parts.reverse();
    Ok(Subject(parts))
}

/// A value up to the `,` or `+` behind it; that, and what follows it.
fn unescape(text: &str) -> Result<(String, Next<'_>), &'static str> {
    if text.starts_with('#') {
        return Err("a value in hexadecimal cannot be compared");
    }
    let mut bytes = Vec::new();
    // Spaces at the end count only behind a backslash.
    let mut kept = 0;
    let mut end = None;
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            ',' | '+' => {
                end = Some((character, text.get(at + 1..).unwrap_or_default()));
                break;
            }
            '"' | ';' | '<' | '>' => return Err("one of \" ; < > has no backslash before it"),
            '\\' => {
                let (_, next) = characters.next().ok_or("it ends in a backslash")?;
                match next.to_digit(16) {
                    Some(high) => {
                        let low = characters.next().and_then(|(_, low)| low.to_digit(16));
                        let byte = u8::try_from(high * 16 + low.ok_or("half a byte behind a backslash")?);
                        bytes.push(byte.map_err(|_| "more than a byte behind a backslash")?);
                    }
                    None if " \"#+,;<=>\\".contains(next) => bytes.extend(u8::try_from(next)),
                    None => return Err("a backslash before a character that needs none"),
                }
                kept = bytes.len();
            }
            _ => {
                bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                if character != ' ' {
                    kept = bytes.len();
                }
            }
        }
    }
    bytes.truncate(kept);
    if bytes.is_empty() {
        return Err("a value is empty");
    }
    Ok((String::from_utf8(bytes).map_err(|_| "a value is no UTF-8")?, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(text: &str) -> Subject {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_written_differently_and_means_the_same_is_equal() {
        for (one, other) in [
            ("CN=backup-1,OU=Storage,O=Example", "cn=backup-1, 2.5.4.11=Storage , o= Example"),
            ("CN=a+UID=7,O=x", "UID=7+CN=a,O=x"),
            (r"CN=Before\0dAfter\2c\20", "CN=Before\\0DAfter\\,\\ "),
            (r"CN=\c3\a4\+", r"CN=ä\+"),
            ("emailAddress=a@b", "1.2.840.113549.1.9.1=a@b"),
            (r"CN=a=b", r"CN=a\=b"),
            (r"CN=\#1", r"CN=\231"),
        ] {
            assert_eq!(subject(one), subject(other), "{one}");
        }
    }

    #[test]
    fn what_only_looks_alike_is_not_equal() {
        for (one, other) in [
            ("CN=backup-1", "CN=backup-10"),
            ("CN=backup-1", "CN=Backup-1"),
            ("CN=a,O=x", "O=x,CN=a"),
            ("CN=a,O=x", "CN=a"),
            ("CN=a,O=x", "CN=a+O=x"),
            ("CN=a,O=x", r"CN=a\,O\=x"),
            ("CN=a", "OU=a"),
            (r"CN=a\\,O=b", r"CN=a\\\,O=b"),
        ] {
            assert_ne!(subject(one), subject(other), "{one}");
        }
    }

    #[test]
    fn what_is_no_subject_is_refused() {
        for text in [
            "",
            "backup-1",
            "CN",
            "CN=",
            "CN= ",
            "=a",
            "XX=a",
            "CN=a,",
            "CN=a,,O=b",
            "CN=a+",
            "CN=a;O=b",
            "/CN=a/O=b",
            r"CN=a\",
            r"CN=a\4",
            r"CN=a\4x",
            r"CN=a\x",
            r"CN=\ff",
            "CN=#0403616263",
            r#"CN="a""#,
            "1.2.=a",
        ] {
            assert!(text.parse::<Subject>().is_err(), "{text}");
        }
    }

    #[test]
    fn certificates_are_compared_by_value_whatever_their_kind_of_string() {
        // A country is a PrintableString, an e-mail address an IA5String, the rest UTF-8.
        for text in ["CN=backup-1,O=Example,C=DE", r"emailAddress=a@b,CN=a\, b", "DC=example,DC=org", "UID=7+CN=a,O=x"]
        {
            let name: Name = text.parse().unwrap();
            assert_eq!(Subject::from(&name), subject(text));
            // What the log says can be put into the list.
            assert_eq!(subject(&name.to_string()), subject(text), "{name}");
        }
    }
}
