// Package s3 is an object.Store in one bucket of an S3 service, below a prefix.
//
// Every Put is one conditional request (If-None-Match: *), never a multipart
// upload, which would drop the condition. A Put that is refused because the name
// is taken reads the object back: it may be its own earlier success.
//
// Bodies carry a CRC32C, signed with the headers, which the service checks and
// keeps; whole objects are checked against it when they are read. The body's
// SHA-256 is not signed: DRC authenticates its objects itself.
//
// A call makes one attempt and reports what happened; callers repeat it. A dead
// or silent service fails a call within a bounded time (Options), and the end of
// the context at once.
//
// Errors that wrap io.ErrUnexpectedEOF mean that an object is shorter than a
// range, never that an answer was cut off.
//
// This is the only package that knows the S3 library.
package s3
