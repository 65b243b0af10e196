package s3

import (
	"bytes"
	"fmt"
	"sync/atomic"
	"testing"

	"drc/internal/object/objecttest"

	"github.com/minio/minio-go/v7"
)

const (
	benchObjectSize  = 4 << 20
	benchParallelism = 8 // times GOMAXPROCS
)

// BenchmarkPut compares what Put does with the other ways to protect a body.
// Objects are replaced in the comparison, for there is no space for all of them.
func BenchmarkPut(b *testing.B) {
	body := objecttest.Bytes(1, benchObjectSize)
	plain := minio.PutObjectOptions{DisableMultipart: true, DisableContentSha256: true}
	for _, way := range []struct {
		name    string
		options minio.PutObjectOptions
	}{
		{"none", minio.PutObjectOptions{DisableMultipart: true, DisableContentSha256: true, UserMetadata: map[string]string{"x-amz-checksum-algorithm": ""}}},
		{"crc32c-header", plain},
		{"crc64nvme-header", plain},
		{"crc32c-trailer", minio.PutObjectOptions{DisableMultipart: true, DisableContentSha256: true, Checksum: minio.ChecksumCRC32C}},
		{"crc64nvme-trailer", minio.PutObjectOptions{DisableMultipart: true, DisableContentSha256: true, Checksum: minio.ChecksumCRC64NVME}},
		{"md5", minio.PutObjectOptions{DisableMultipart: true, DisableContentSha256: true, SendContentMd5: true}},
		{"sha256-signed", minio.PutObjectOptions{DisableMultipart: true}},
	} {
		b.Run(way.name, func(b *testing.B) {
			store := newStore(b)
			client := store.client
			if way.name == "none" || way.name == "sha256-signed" {
				// Without trailing headers the library adds no checksum itself.
				host, secure := store.location.endpoint()
				var err error
				client, err = minio.New(host, &minio.Options{Creds: store.credentials, Secure: secure, Transport: store.transport, Region: "us-east-1", MaxRetries: 1})
				if err != nil {
					b.Fatal(err)
				}
				way.options.UserMetadata = nil
			}
			benchParallel(b, func(i int64) error {
				options := way.options
				switch way.name {
				case "crc32c-header":
					options.UserMetadata = map[string]string{checksumHeader: checksum(body)}
				case "crc64nvme-header":
					options.UserMetadata = map[string]string{minio.ChecksumCRC64NVME.Key(): minio.ChecksumCRC64NVME.ChecksumBytes(body).Encoded()}
				}
				_, err := client.PutObject(b.Context(), store.location.Bucket, store.location.key(fmt.Sprintf("%d", i%64)), bytes.NewReader(body), benchObjectSize, options)
				return err
			})
		})
	}
}

// BenchmarkStore measures the Store as it is used: every put is a new object.
func BenchmarkStore(b *testing.B) {
	body := objecttest.Bytes(1, benchObjectSize)
	store := newStore(b)
	b.Run("Put", func(b *testing.B) {
		run := objecttest.RandomName()
		benchParallel(b, func(i int64) error {
			name := fmt.Sprintf("%s/%d", run, i)
			if _, err := store.Put(b.Context(), name, body); err != nil {
				return err
			}
			return nil
		})
		b.StopTimer()
		for info, err := range store.List(b.Context(), run+"/", "") {
			if err != nil {
				b.Fatal(err)
			}
			store.Delete(b.Context(), info.Name)
		}
	})
	for i := range 16 {
		if _, err := store.Put(b.Context(), fmt.Sprintf("get/%d", i), body); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("Get", func(b *testing.B) {
		benchParallel(b, func(i int64) error {
			_, _, err := store.Get(b.Context(), fmt.Sprintf("get/%d", i%16), benchObjectSize, nil)
			return err
		})
	})
	b.Run("GetRange4K", func(b *testing.B) {
		benchParallel(b, func(i int64) error {
			_, err := store.GetRange(b.Context(), fmt.Sprintf("get/%d", i%16), i%1000*4096, 4096, nil)
			return err
		})
		b.SetBytes(4096)
	})
	b.Run("PutSmall", func(b *testing.B) {
		run := objecttest.RandomName()
		benchParallel(b, func(i int64) error {
			_, err := store.Put(b.Context(), fmt.Sprintf("%s/%d", run, i), body[:4096])
			return err
		})
		b.SetBytes(4096)
	})
}

func benchParallel(b *testing.B, do func(i int64) error) {
	b.SetBytes(benchObjectSize)
	b.SetParallelism(benchParallelism)
	var count atomic.Int64
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := do(count.Add(1)); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
