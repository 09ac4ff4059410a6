// The bytes that cross a circuit: pseudo-random from a seed, so that either
// end can produce them and check them byte for byte without holding them all.
import { createCipheriv } from 'node:crypto'

const CHUNK = 64 * 1024

export function payload (seed) {
  const cipher = createCipheriv('aes-256-ctr', Buffer.alloc(32, seed), Buffer.alloc(16))
  return length => cipher.update(Buffer.alloc(length))
}

// Sends this many bytes, no faster than they go.
export async function send (stream, bytes, count) {
  for (let sent = 0; sent < count; sent += CHUNK) {
    if (!stream.send(bytes(Math.min(CHUNK, count - sent)))) await stream.onDrain()
  }
}

// Reads until the other end closes and checks every byte; returns how many
// there were, and the error if it was not a close.
export async function receive (stream, expected) {
  let count = 0
  try {
    for await (const chunk of stream) {
      const got = chunk.subarray()
      if (!expected(got.length).equals(got)) {
        throw new WrongByte(`a wrong byte within ${got.length} after the first ${count}`)
      }
      count += got.length
    }
  } catch (error) {
    if (error instanceof WrongByte) throw error
    return { count, error }
  }
  return { count }
}

class WrongByte extends Error {}
