package s3

import "testing"

func FuzzParseURL(f *testing.F) {
	for _, s := range []string{"", "s3://b", "s3://b/p?endpoint=http://127.0.0.1:9000&region=r", "s3://b/p?endpoint=://", "s3:///p", "s3://u:p@b/", "s3://b/../x", "s3://b/%00", "s3://b?x=1", "file:///x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		if l, err := ParseURL(raw); err == nil && l.Bucket == "" {
			t.Errorf("%q has no bucket and is taken", raw)
		}
	})
}
