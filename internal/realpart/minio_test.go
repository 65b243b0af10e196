package realpart

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func get(t *testing.T, url string) (int, error) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Get(url)
	if err != nil {
		return 0, err
	}
	answer.Body.Close()
	return answer.StatusCode, nil
}

// TestMinIO_Life: several servers, each on its own, that stop, start again on
// their port, and leave nothing behind.
func TestMinIO_Life(t *testing.T) {
	instances, stop, err := StartMinIO(3)
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Dir(instances[0].dir)
	for i, instance := range instances {
		url := instance.URL("bucket", "prefix")
		if !strings.HasPrefix(url, "s3://bucket/prefix?endpoint=http://127.0.0.1:") {
			t.Errorf("URL: %s", url)
		}
		for _, end := range []func(){instance.Stop, instance.Kill} {
			endpoint := instance.Endpoint()
			end()
			end() // once more does nothing
			if _, err := get(t, endpoint); err == nil {
				t.Errorf("server %d answers after it was ended", i)
			}
			for range 2 {
				if err := instance.Start(); err != nil {
					t.Fatal(err)
				}
			}
			if instance.Endpoint() != endpoint {
				t.Errorf("server %d moved from %s to %s", i, endpoint, instance.Endpoint())
			}
			// The bucket is there and its door is closed.
			if status, err := get(t, endpoint+"/bucket/"); err != nil || status != http.StatusForbidden {
				t.Errorf("server %d: status %d, %v", i, status, err)
			}
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(root); !os.IsNotExist(err) {
		t.Errorf("the data is still there: %v", err)
	}
}

func TestMinIO_NotBuilt(t *testing.T) {
	t.Setenv("DRC_TOOLS_DIR", t.TempDir())
	if _, _, err := StartMinIO(1); err == nil || !strings.Contains(err.Error(), "make minio-build") {
		t.Errorf("the error does not say what to do: %v", err)
	}
}
