// The bytes that cross a circuit: pseudo-random from a seed, so that either
// end can produce them and check them byte for byte without holding them all.
import { createCipheriv } from 'node:crypto'

const CHUNK = 64 * 1024

export function payload (seed) {
  const cipher = createCipheriv('aes-256-ctr', Buffer.alloc(32, seed), Buffer.alloc(16))
  return length => cipher.update(Buffer.alloc(length))
}

// Sends this many bytes, respecting backpressure.
export async function send (stream, bytes, count) {
  for (let sent = 0; sent < count; sent += CHUNK) {
    if (!stream.send(bytes(Math.min(CHUNK, count - sent)))) await stream.onDrain()
  }
}

// Reads until the other end closes and checks every byte; returns how many
// there were, and the error if it was not a close. By events: the stream's
// iterator drops what it has not handed out yet when a reset comes.
export function receive (stream, expected) {
  let count = 0
  return new Promise((resolve, reject) => {
    stream.addEventListener('message', ({ data }) => {
      const got = data.subarray()
      if (!expected(got.length).equals(got)) {
        reject(new Error(`a wrong byte within ${got.length} after the first ${count}`))
      }
      count += got.length
    })
    const end = () => {
      const whole = ['open', 'closing', 'closed'].includes(stream.status)
      resolve({ count, error: whole ? undefined : new Error(`the stream is ${stream.status}`) })
    }
    if (stream.readableEnded) end()
    else stream.addEventListener('end', end)
  })
}
