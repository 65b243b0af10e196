module drc

go 1.26.0

// The S3 protocol; only internal/object/s3 imports it.
require github.com/minio/minio-go/v7 v7.4.1

// Tests fail when a goroutine is left behind.
require go.uber.org/goleak v1.3.0

// System calls that the standard library lacks: renameat2, pwritev, fdatasync, fallocate.
require golang.org/x/sys v0.49.0

require (
	filippo.io/age v1.3.2 // seals keys to recipients
	github.com/cockroachdb/pebble/v2 v2.1.7 // the dedup index on disk
	github.com/hashicorp/golang-lru/v2 v2.0.7 // bounded caches: of restorer and of the dedup index
	github.com/klauspost/compress v1.20.3 // zstd
	github.com/klauspost/reedsolomon v1.14.2 // the erasure code
	github.com/restic/chunker v0.5.0 // content-defined cut points
	github.com/tidwall/btree v1.8.2 // the tree under the extent map
	github.com/zeebo/blake3 v0.2.4 // keyed ids and checksums
	golang.org/x/sync v0.24.0 // groups of goroutines that end together
	golang.org/x/time v0.16.0 // the bandwidth limit
	pgregory.net/rapid v1.3.0 // property and model tests
)

// Tests only: bad networks before real stores, and the logger that it wants.
require (
	github.com/Shopify/toxiproxy/v2 v2.12.0
	github.com/rs/zerolog v1.33.0
)

require (
	github.com/BurntSushi/toml v1.6.0 // the configuration file
	github.com/dustin/go-humanize v1.1.0 // sizes for people
	github.com/prometheus/client_golang v1.25.0 // metrics
	github.com/rogpeppe/go-internal v1.16.0 // testscript: sessions of the command line as tests
	github.com/spf13/cobra v1.10.2 // commands, flags (pflag) and shell completion
	github.com/spf13/pflag v1.0.10 // which flags were given, from cobra
	github.com/vbauerster/mpb/v8 v8.12.0 // the progress bar of restore
	golang.org/x/term v0.47.0 // whether there is a terminal
)

require (
	filippo.io/hpke v0.4.0 // indirect
	github.com/DataDog/zstd v1.5.7 // indirect
	github.com/RaduBerinde/axisds v0.1.0 // indirect
	github.com/RaduBerinde/btreemap v0.0.0-20250419174037-3d62b7205d54 // indirect
	github.com/VividCortex/ewma v1.2.0 // indirect
	github.com/acarl005/stripansi v0.0.0-20180116102854-5a71ef0e047d // indirect
	github.com/beorn7/perks v1.0.1 // indirect
	github.com/cespare/xxhash/v2 v2.3.0 // indirect
	github.com/clipperhouse/uax29/v2 v2.7.0 // indirect
	github.com/cockroachdb/crlib v0.0.0-20241112164430-1264a2edc35b // indirect
	github.com/cockroachdb/errors v1.11.3 // indirect
	github.com/cockroachdb/logtags v0.0.0-20230118201751-21c54148d20b // indirect
	github.com/cockroachdb/redact v1.1.5 // indirect
	github.com/cockroachdb/swiss v0.0.0-20260820225851-333444432258 // indirect
	github.com/cockroachdb/tokenbucket v0.0.0-20230807174530-cc333fc44b06 // indirect
	github.com/getsentry/sentry-go v0.27.0 // indirect
	github.com/gogo/protobuf v1.3.2 // indirect
	github.com/golang/snappy v0.0.5-0.20231225225746-43d5d4cd4e0e // indirect
	github.com/google/uuid v1.6.0 // indirect
	github.com/gorilla/mux v1.8.1 // indirect
	github.com/inconshreveable/mousetrap v1.1.0 // indirect
	github.com/klauspost/cpuid/v2 v2.4.0 // indirect
	github.com/klauspost/crc32 v1.3.0 // indirect
	github.com/kr/pretty v0.3.1 // indirect
	github.com/kr/text v0.2.0 // indirect
	github.com/mattn/go-colorable v0.1.15 // indirect
	github.com/mattn/go-isatty v0.0.22 // indirect
	github.com/mattn/go-runewidth v0.0.24 // indirect
	github.com/minio/crc64nvme v1.1.1 // indirect
	github.com/minio/md5-simd v1.1.2 // indirect
	github.com/minio/minlz v1.0.1-0.20250507153514-87eb42fe8882 // indirect
	github.com/munnerz/goautoneg v0.0.0-20191010083416-a7dc8b61c822 // indirect
	github.com/philhofer/fwd v1.2.0 // indirect
	github.com/pkg/errors v0.9.1 // indirect
	github.com/prometheus/client_model v0.6.3 // indirect
	github.com/prometheus/common v0.72.0 // indirect
	github.com/prometheus/procfs v0.22.0 // indirect
	github.com/rs/xid v1.6.0 // indirect
	github.com/tinylib/msgp v1.6.4 // indirect
	github.com/zeebo/xxh3 v1.1.0 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/crypto v0.57.0 // indirect
	golang.org/x/exp v0.0.0-20230626212559-97b1e661b5df // indirect
	golang.org/x/net v0.60.0 // indirect
	golang.org/x/text v0.42.0 // indirect
	golang.org/x/tools v0.50.0 // indirect
	google.golang.org/protobuf v1.36.12 // indirect
	gopkg.in/ini.v1 v1.67.3 // indirect
	gopkg.in/tomb.v1 v1.0.0-20141024135613-dd632973f1e7 // indirect
)
