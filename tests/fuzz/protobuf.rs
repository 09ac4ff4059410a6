//! A naive protobuf decoder to compare with, and an encoder of valid and invalid messages.

use proptest::{collection::vec, prelude::*, sample::select};

/// The kind of each known field, by the path of field numbers to it.
pub type Schema = fn(&[u32]) -> Option<Kind>;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Number,
    Bytes,
    Message,
}

/// A field of the schema.
#[derive(Debug)]
pub struct Field {
    pub path: Vec<u32>,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Number(u64),
    Bytes(Vec<u8>),
    Message,
}

/// The specification's `HopMessage`.
pub const HOP: Schema = |path| match path {
    [1 | 5] | [3, 1] | [4, 1 | 2] => Some(Kind::Number),
    [2..=4] => Some(Kind::Message),
    [2, 1 | 2] | [3, 2 | 3] => Some(Kind::Bytes),
    _ => None,
};

/// The specification's `StopMessage`.
pub const STOP: Schema = |path| match path {
    [1 | 4] | [3, 1 | 2] => Some(Kind::Number),
    [2 | 3] => Some(Kind::Message),
    [2, 1 | 2] => Some(Kind::Bytes),
    _ => None,
};

/// Deeper nesting is not decoded here; prost's limit is a hundred.
const MOST_DEPTH: usize = 90;

/// Why a message is invalid.
#[derive(Debug, PartialEq)]
pub enum Invalid {
    Malformed,
    TooDeep,
}

/// The known fields of a message in order. `None`: it is nested too deep for this decoder.
pub fn read(bytes: &[u8], schema: Schema) -> Option<Result<Vec<Field>, Invalid>> {
    let mut fields = Vec::new();
    match message(bytes, &mut Vec::new(), schema, &mut fields) {
        Ok(()) => Some(Ok(fields)),
        Err(Invalid::TooDeep) => None,
        Err(error) => Some(Err(error)),
    }
}

fn message(
    mut bytes: &[u8],
    path: &mut Vec<u32>,
    schema: Schema,
    fields: &mut Vec<Field>,
) -> Result<(), Invalid> {
    while !bytes.is_empty() {
        let (number, wire_type) = key(&mut bytes)?;
        path.push(number);
        match (schema(path), wire_type) {
            (Some(Kind::Number), 0) => {
                let value = Value::Number(take_varint(&mut bytes)?);
                let path = path.clone();
                fields.push(Field { path, value });
            }
            (Some(kind @ (Kind::Bytes | Kind::Message)), 2) => {
                let inner = take_bytes(&mut bytes)?;
                let value = match kind {
                    Kind::Message => Value::Message,
                    _ => Value::Bytes(inner.to_vec()),
                };
                fields.push(Field { path: path.clone(), value });
                if kind == Kind::Message {
                    message(inner, path, schema, fields)?;
                }
            }
            (Some(_), _) => return Err(Invalid::Malformed),
            (None, _) => skip(&mut bytes, number, wire_type, path.len())?,
        }
        path.pop();
    }
    Ok(())
}

fn key(bytes: &mut &[u8]) -> Result<(u32, u64), Invalid> {
    let key = take_varint(bytes)?;
    let key = u32::try_from(key).map_err(|_| Invalid::Malformed)?;
    let (number, wire_type) = (key >> 3, u64::from(key & 7));
    match number == 0 || wire_type > 5 {
        true => Err(Invalid::Malformed),
        false => Ok((number, wire_type)),
    }
}

fn skip(bytes: &mut &[u8], number: u32, wire_type: u64, depth: usize) -> Result<(), Invalid> {
    if depth > MOST_DEPTH {
        return Err(Invalid::TooDeep);
    }
    match wire_type {
        0 => take_varint(bytes).map(drop),
        1 => take(bytes, 8).map(drop),
        2 => take_bytes(bytes).map(drop),
        3 => loop {
            let (inner, wire_type) = key(bytes)?;
            match wire_type {
                4 if inner == number => return Ok(()),
                4 => return Err(Invalid::Malformed),
                _ => skip(bytes, inner, wire_type, depth + 1)?,
            }
        },
        5 => take(bytes, 4).map(drop),
        _ => Err(Invalid::Malformed),
    }
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Result<&'a [u8], Invalid> {
    let (taken, rest) = bytes.split_at_checked(count).ok_or(Invalid::Malformed)?;
    *bytes = rest;
    Ok(taken)
}

fn take_bytes<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8], Invalid> {
    let count = take_varint(bytes)?;
    take(bytes, usize::try_from(count).unwrap_or(usize::MAX))
}

/// Reads a varint; protobuf allows non-minimal ones.
fn take_varint(bytes: &mut &[u8]) -> Result<u64, Invalid> {
    let mut value = 0;
    for at in 0..10 {
        let byte = u64::from(take(bytes, 1)?[0]);
        if at == 9 && byte > 1 {
            return Err(Invalid::Malformed);
        }
        value |= (byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Invalid::Malformed)
}

/// The size of the length in front of `bytes`, and its value. `None` if it is incomplete, larger than 16 bits, or not
/// minimal, which multiformats do not allow.
pub fn length_in_front(bytes: &[u8]) -> Option<(usize, usize)> {
    let last = bytes.iter().take(3).position(|byte| byte & 0x80 == 0)?;
    let minimal = last == 0 || bytes[last] != 0;
    let value = (0..=last).fold(0, |sum, at| sum | usize::from(bytes[at] & 0x7f) << (7 * at));
    (minimal && value <= usize::from(u16::MAX)).then_some((last + 1, value))
}

/// The last number at `path`.
pub fn number(fields: &[Field], path: &[u32]) -> Option<u64> {
    let last = fields.iter().rev().find(|field| field.path == path)?;
    match last.value {
        Value::Number(number) => Some(number),
        _ => None,
    }
}

/// The last bytes at `path`.
pub fn bytes<'a>(fields: &'a [Field], path: &[u32]) -> Option<&'a [u8]> {
    let last = fields.iter().rev().find(|field| field.path == path)?;
    match &last.value {
        Value::Bytes(bytes) => Some(bytes),
        _ => None,
    }
}

/// All bytes at `path`.
pub fn all_bytes<'a>(fields: &'a [Field], path: &'a [u32]) -> impl Iterator<Item = &'a [u8]> {
    fields.iter().filter_map(move |field| match &field.value {
        Value::Bytes(bytes) if field.path == path => Some(&**bytes),
        _ => None,
    })
}

/// A CONNECT to the peer with this id.
pub fn connect(id: &[u8]) -> Vec<u8> {
    let mut message = vec![8, 1];
    put(&mut message, 2, &field(1, id));
    message
}

fn field(number: u64, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put(&mut bytes, number, content);
    bytes
}

fn put(bytes: &mut Vec<u8>, number: u64, content: &[u8]) {
    varint(bytes, number << 3 | 2, 0);
    varint(bytes, content.len() as u64, 0);
    bytes.extend(content);
}

/// Writes a varint with this many redundant bytes.
pub fn varint(bytes: &mut Vec<u8>, mut value: u64, padding: usize) {
    while value > 0x7f {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    for _ in 0..padding {
        if let Some(last) = bytes.last_mut() {
            *last |= 0x80;
        }
        bytes.push(0);
    }
}

/// Messages: valid ones, and with fields that are unknown, repeated, of the wrong type, of a false length, or groups;
/// some of them truncated or with flipped bits.
pub fn messages() -> impl Strategy<Value = Vec<u8>> {
    let message = vec(fields(), 0..7).prop_map(|fields| fields.concat());
    let spoiled = prop_oneof![
        6 => Just((None, None)),
        1 => any::<prop::sample::Index>().prop_map(|cut| (Some(cut), None)),
        1 => (any::<prop::sample::Index>(), 0..8u32)
            .prop_map(|(at, bit)| (None, Some((at, 1 << bit)))),
    ];
    (message, spoiled).prop_map(|(mut message, (cut, flip))| {
        if message.is_empty() {
            return message;
        }
        if let Some(cut) = cut {
            message.truncate(cut.index(message.len()));
        }
        if let Some((at, bit)) = flip {
            let at = at.index(message.len());
            message[at] ^= bit;
        }
        message
    })
}

fn fields() -> impl Strategy<Value = Vec<u8>> {
    let known = prop_oneof![
        4 => (0..4u64, padding()).prop_map(|(kind, padding)| numbered(1, kind, padding)),
        3 => peers().prop_map(|peer| field(2, &peer)),
        2 => (select(vec![4u64, 5]), statuses(), padding())
            .prop_map(|(number, status, padding)| numbered(number, status, padding)),
        1 => (3..5u64, vec(any_field(), 0..3)).prop_map(|(n, inner)| field(n, &inner.concat())),
    ];
    prop_oneof![4 => known, 2 => any_field()]
}

fn peers() -> impl Strategy<Value = Vec<u8>> {
    let id = prop_oneof![
        // Well-formed ones: an identity or a hash, of the right length and of others.
        4 => (select(vec![0u8, 0x12]), vec(any::<u8>(), 0..70)).prop_map(|(code, digest)| {
            [&[code, digest.len() as u8][..], &digest].concat()
        }),
        1 => Just([&[0, 32][..], &[7; 32]].concat()), // the source itself
        1 => vec(any::<u8>(), 0..80),
    ];
    let addresses = vec(vec(any::<u8>(), 0..20), 0..3);
    (vec(id, 0..3), addresses, vec(any_field(), 0..2)).prop_map(|(ids, addresses, other)| {
        let ids = ids.iter().map(|id| field(1, id));
        let addresses = addresses.iter().map(|address| field(2, address));
        ids.chain(addresses).chain(other).collect::<Vec<_>>().concat()
    })
}

fn statuses() -> impl Strategy<Value = u64> {
    prop_oneof![select(vec![100, 203, 1 << 31, 1 << 32, u64::MAX]), any::<u64>()]
}

fn padding() -> impl Strategy<Value = usize> {
    prop_oneof![6 => Just(0), 1 => 1..11usize]
}

fn numbered(number: u64, value: u64, padding: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint(&mut bytes, number << 3, 0);
    varint(&mut bytes, value, padding);
    bytes
}

fn field_numbers() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 0..8u64,
        1 => select(vec![15, 16, 2047, (1 << 29) - 1, 1 << 29, 1 << 61, u64::MAX >> 3]),
    ]
}

fn any_field() -> impl Strategy<Value = Vec<u8>> {
    let key = |number: u64, wire_type: u64| {
        let mut bytes = Vec::new();
        varint(&mut bytes, number << 3 | wire_type, 0);
        bytes
    };
    let leaf = prop_oneof![
        3 => (field_numbers(), any::<u64>(), padding()).prop_map(|(n, v, p)| numbered(n, v, p)),
        2 => (field_numbers(), vec(any::<u8>(), 0..20)).prop_map(|(n, bytes)| field(n, &bytes)),
        1 => (field_numbers(), any::<u64>(), padding()).prop_map(move |(n, length, padding)| {
            let mut bytes = key(n, 2); // a length without the bytes
            varint(&mut bytes, length, padding);
            bytes
        }),
        1 => (field_numbers(), any::<[u8; 4]>())
            .prop_map(move |(n, bytes)| [key(n, 5), bytes.into()].concat()),
        1 => (field_numbers(), any::<[u8; 8]>())
            .prop_map(move |(n, bytes)| [key(n, 1), bytes.into()].concat()),
        1 => (field_numbers(), 3..8u64).prop_map(move |(n, wire_type)| key(n, wire_type)),
        1 => (field_numbers(), 1..120usize).prop_map(move |(n, deep)| {
            [key(n, 3).repeat(deep), key(n, 4).repeat(deep)].concat()
        }),
    ];
    leaf.prop_recursive(4, 16, 4, move |inner| {
        (field_numbers(), vec(inner, 0..4), any::<bool>()).prop_map(move |(n, inner, closed)| {
            let end = if closed { key(n, 4) } else { Vec::new() };
            [key(n, 3), inner.concat(), end].concat()
        })
    })
}
