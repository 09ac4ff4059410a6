//! `AsyncWrite` for streams that wrap another one.

/// Implements `AsyncWrite`'s methods by a call of the same method of a field: `delegate_write!(stream);` stands in an
/// `impl AsyncWrite for …`. With `stream, Deref::deref` they are methods of what this function makes of the field.
macro_rules! delegate_write {
    ($field:ident) => {
        $crate::delegate::delegate_write!($field, std::convert::identity);
    };
    ($field:ident, $of:path) => {
        $crate::delegate::delegate_write!($field, $of:
            poll_write(bytes: &[u8]) -> usize,
            poll_write_vectored(buffers: &[std::io::IoSlice<'_>]) -> usize,
            poll_flush() -> (), poll_close() -> ());
    };
    ($field:ident, $of:path: $($method:ident($($data:ident: $type:ty)?) -> $output:ty),+) => {
        $(fn $method(
            mut self: std::pin::Pin<&mut Self>,
            cx: &mut std::task::Context<'_>,
            $($data: $type)?
        ) -> std::task::Poll<std::io::Result<$output>> {
            std::pin::Pin::new(&mut $of(&mut self.$field)).$method(cx, $($data)?)
        })+
    };
}

pub(crate) use delegate_write;
