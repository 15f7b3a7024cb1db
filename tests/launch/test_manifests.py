"""The JobSet and the SkyPilot task have the structure that is expected."""

import math
import pathlib
import re

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
TRAIN = "train --config configs/var.py:d16 --workdir /mnt/gcs/runs/d16".split()


@pytest.fixture
def jobset(dry_run):
  """A function that returns the manifest that would be applied."""

  def run(topology, *command):
    printed = dry_run("gke_jobset.sh", topology, *command).splitlines()
    assert printed[0] == "kubectl apply -f - <<'END'"
    assert printed[-1] == "END"
    return yaml.safe_load("\n".join(printed[1:-1]))

  return run


@pytest.mark.parametrize(
  "topology, accelerator",
  [
    ("v5e:4x4", "tpu-v5-lite-podslice"),
    ("v5p:4x4x4", "tpu-v5p-slice"),
    ("v6e:8x16", "tpu-v6e-slice"),
  ],
)
def test_a_jobset_has_a_pod_for_each_host_of_the_topology(
  topology, accelerator, jobset
):
  manifest = jobset(topology, *TRAIN)
  assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert manifest["kind"] == "JobSet"
  assert manifest["metadata"]["name"] == "var-d16"
  [job] = manifest["spec"]["replicatedJobs"]
  assert job["replicas"] == 1
  pods = job["template"]["spec"]
  spec = pods["template"]["spec"]
  [container] = spec["containers"]
  chips = math.prod(map(int, topology.split(":")[1].split("x")))
  here = container["resources"]["limits"]["google.com/tpu"]
  assert pods["parallelism"] == pods["completions"] == chips // here
  assert spec["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": accelerator,
    "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
  }
  assert container["image"] == "example.org/var-jax"
  assert container["command"] + container["args"] == ["var-jax", *TRAIN]


def test_a_jobset_starts_again_but_not_with_what_cannot_work(jobset):
  spec = jobset("v5e:4x4", *TRAIN)["spec"]
  assert spec["failurePolicy"]["maxRestarts"] > 0
  assert spec["failurePolicy"]["rules"] == [
    {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]
  pods = spec["replicatedJobs"][0]["template"]["spec"]
  assert pods["backoffLimit"] == 0
  assert pods["template"]["spec"]["restartPolicy"] == "Never"
  [rule] = pods["podFailurePolicy"]["rules"]
  [container] = pods["template"]["spec"]["containers"]
  assert rule["action"] == "FailJob"
  assert rule["onExitCodes"] == {
    "containerName": container["name"],
    "operator": "In",
    "values": [2],
  }


def test_a_jobset_mounts_the_bucket_uncached(jobset):
  spec = jobset("v5e:4x4", *TRAIN)["spec"]
  pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]
  assert pod["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
  assert "hostNetwork" not in pod["spec"]
  volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
  [container] = pod["spec"]["containers"]
  mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
  assert mounts.keys() == {"/mnt/gcs", "/dev/shm"}
  assert set(mounts.values()) == volumes.keys()
  attributes = volumes[mounts["/mnt/gcs"]]["csi"]["volumeAttributes"]
  assert attributes["bucketName"] == "my-bucket"
  assert attributes["mountOptions"].split(",") == [
    "implicit-dirs",
    "metadata-cache:ttl-secs:0",
    "metadata-cache:negative-ttl-secs:0",
  ]


def test_a_jobset_takes_arguments_as_they_are(jobset):
  odd = ["train", "it's", "${NAME} & [a, b]: #c", '"', "\\n", "two  words"]
  manifest = jobset("v5e:4x4", *odd)
  pods = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert pods["template"]["spec"]["containers"][0]["args"] == odd


def test_a_jobset_is_applied(tmp_path, launch, write_program, jobset):
  write_program("bin/kubectl", f"echo $@; cat >{tmp_path}/applied")
  done = launch("gke_jobset.sh", "v5e:4x4", *TRAIN)
  assert (done.returncode, done.stdout) == (0, "apply -f -\n")
  applied = yaml.safe_load((tmp_path / "applied").read_text())
  assert applied == jobset("v5e:4x4", *TRAIN)


def test_the_template_is_yaml_and_is_filled_completely(jobset):
  template = (LAUNCH / "gke_jobset.yaml").read_text()
  assert yaml.safe_load(template)["kind"] == "JobSet"
  manifest = jobset("v5e:4x4", "doctor")
  assert "${" not in yaml.safe_dump(manifest)


def test_skypilot_trains_the_config_that_it_is_given(launch):
  task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
  assert task["resources"]["accelerators"] == "tpu-v5litepod-16"
  assert task["resources"]["infra"] == "gcp"
  assert task["num_nodes"] == 1
  assert task["workdir"] == "."
  required = [name for name, value in task["envs"].items() if value is None]
  assert required == ["BUCKET", "CONFIG", "WORKDIR"]
  setup = task["setup"].splitlines()
  assert setup[-2:] == [
    "launch/worker.sh install",
    'launch/worker.sh mount "$BUCKET"',
  ]
  run = task["run"]
  assert 'var-jax train --config "$CONFIG" --workdir "$WORKDIR"' in run
  for name in re.findall(r"\$(\w+)", task["setup"] + run):
    assert name in task["envs"]
