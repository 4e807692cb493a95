{{- define "tcpip-bypass.platform" -}}
{{- get (.Files.Get "files/platforms.yaml" | fromYaml) .Values.platform | toYaml -}}
{{- end -}}

{{- define "tcpip-bypass.version" -}}
{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "tcpip-bypass.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ include "tcpip-bypass.version" . }}{{ end }}
{{- end -}}

{{- /*
The labels that Kubernetes recommends, of (list $ COMPONENT). A DaemonSet's selector never changes: it has but
the first, which therefore is another one for what is not the DaemonSet's.
*/ -}}
{{- define "tcpip-bypass.labels" -}}
{{- $component := index . 1 -}}
{{- with index . 0 -}}
app.kubernetes.io/name: {{ ternary "tcpip-bypass" (printf "tcpip-bypass-%s" $component) (eq $component "node") }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ include "tcpip-bypass.version" . | quote }}
app.kubernetes.io/component: {{ $component }}
app.kubernetes.io/part-of: tcpip-bypass
app.kubernetes.io/managed-by: {{ .Values.managedBy | default .Release.Service }}
{{- end -}}
{{- end -}}

{{- /*
The account of the DaemonSet's pods. On OpenShift an SCC is bound to it, which the default account must not get. So
there the DaemonSet has to be deleted before the account is.
*/ -}}
{{- define "tcpip-bypass.account" -}}
{{- $platform := include "tcpip-bypass.platform" . | fromYaml -}}
{{ ternary "tcpip-bypass-node" "default" (hasKey $platform "scc") }}
{{- end -}}

{{- /* Kubernetes before 1.30 knows AppArmor by an annotation, and refuses the field. Empty: no. */ -}}
{{- define "tcpip-bypass.has_apparmor_field" -}}
{{- if semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version }}true{{ end -}}
{{- end -}}
