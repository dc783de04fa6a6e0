//! The wire format of protocol buffers, for writing.
//!
//! A message is a sequence of fields: a varint `number << 3 | kind`, then the value. Kind 0 is a
//! varint, kind 2 a length and that many bytes, kind 5 four bytes.

/// An encoded message.
#[derive(Debug, Default)]
pub(super) struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut n: u64) {
        while n >= 0x80 {
            self.0.push(n as u8 | 0x80);
            n >>= 7;
        }
        self.0.push(n as u8);
    }

    fn key(&mut self, field: u32, kind: u32) {
        self.varint(u64::from(field << 3 | kind));
    }

    /// An int32, int64 or enum. Negative numbers take ten bytes.
    pub(super) fn int(&mut self, field: u32, value: i64) {
        self.key(field, 0);
        self.varint(value as u64);
    }

    pub(super) fn float(&mut self, field: u32, value: f32) {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn bytes(&mut self, field: u32, value: &[u8]) {
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }

    pub(super) fn text(&mut self, field: u32, value: &str) {
        self.bytes(field, value.as_bytes());
    }

    /// A message inside this one, which `fill` writes.
    pub(super) fn message(&mut self, field: u32, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.bytes(field, &inner.0);
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of Google's protobuf for Python, and the examples of its documentation (150, "testing").
    #[test]
    fn fields_as_protobuf_writes_them() {
        let mut message = Message::default();
        message.int(1, 150);
        message.text(2, "testing");
        message.message(3, |inner| inner.int(1, 150));
        message.float(2, 1.0);
        message.int(20, -1);
        let expected = b"\x08\x96\x01\x12\x07testing\x1a\x03\x08\x96\x01\x15\x00\x00\x80\x3f\
            \xa0\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01";
        assert_eq!(message.into_bytes(), expected);
    }
}
